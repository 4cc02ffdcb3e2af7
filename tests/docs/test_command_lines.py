"""What the Markdown files promise exists: commands, flags, keys, targets, links and code."""

import argparse
import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from omegaconf import OmegaConf

from region_pretrain.commands import cli
from region_pretrain.config import load_config
from region_pretrain.engine.command_line import config_of
from region_pretrain.jobs.cluster import parse_slurm
from region_pretrain.overrides import apply_overrides, dotted_keys
from region_pretrain.sweeps.definition import load_sweep, parse_sweep

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(ROOT.glob("projects/*/README.md"))
MARKDOWN = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "projects/README.md"]
MARKDOWN += METHODS
SWEEPS = sorted(ROOT.glob("configs/sweeps/*.py"))

#: What stands in a command line for something of the reader's -> a value of the same kind.
PLACEHOLDERS = {
    "CONFIG": "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py",
    "DIR": "images",
    "NUMBER_OF_CLASSES": "10",
    "clusters/mine.py": "configs/clusters/example.py",
    "mine/region_byol_shapes.py": "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py",
    "mine/region_byol_recipe.py": "projects/SoCo/configs/common/soco.py",
}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
_COMMAND = re.compile(
    r"^ *((?:\w+=\S+ )?(?=python |tools/|make |region-pretrain )(?:.*\\\n)*.*)", re.MULTILINE
)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4,}\S.*\n(?:\n(?= {4}))?)+", re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")


class Parsed(BaseException):
    """Raised in a tool's ``main`` as soon as its arguments are parsed."""


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else (ast.get_docstring(ast.parse(text)) or "") + "\n"


def split(text: str) -> tuple[list[tuple[str, str]], str]:
    """Code blocks as (language, code), and the prose with its inline code."""
    blocks = _FENCED.findall(text)
    prose = _FENCED.sub("", text)
    return [*blocks, *(("", code) for code in _INDENTED.findall(prose))], _INDENTED.sub("", prose)


def command_lines(text: str) -> list[list[str]]:
    """The words of every command of ours, in blocks and in inline code."""
    blocks, prose = split(text)
    found = [line for _, code in blocks for line in _COMMAND.findall(code)]
    inline = (" ".join(code.split()) for code in _INLINE.findall(prose))
    found += [code for code in inline if _COMMAND.fullmatch(code)]
    commands = []
    for line in found:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        words = [word for word in words if word != "..."]
        while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            words.pop(0)
        if ">" in words:
            del words[words.index(">") :]
        commands.append(words[1:] if words[0] == "python" else words)
    return commands


def parse(words: list[str], monkeypatch) -> argparse.Namespace:
    """The arguments as the tool's own parser understands them; nothing is run."""
    if words[0] == cli.PROG:
        tool, arguments = cli, words[1:]
    else:
        spec = importlib.util.spec_from_file_location(Path(words[0]).stem, ROOT / words[0])
        tool, arguments = importlib.util.module_from_spec(spec), words[1:]
        spec.loader.exec_module(tool)
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(self, *args, _original=original, **kwargs):
            raise Parsed(_original(self, *args, **kwargs))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    monkeypatch.setattr(sys, "argv", [words[0], *arguments])
    with pytest.raises(Parsed) as stopped:
        tool.main()
    return stopped.value.args[0]


def help_examples() -> dict[str, list[list[str]]]:
    """The command lines in ``region-pretrain COMMAND --help``, by command."""
    found = {}
    for name, (module, _) in cli.COMMANDS.items():
        module = importlib.import_module(f"region_pretrain.commands.{module}")
        parser = module.make_parser(f"{cli.PROG} {name}")
        text = f"{parser.description}\n\n{parser.epilog or ''}\n" % {"prog": parser.prog}
        found[name] = command_lines(text)
    return found


def commands() -> list:
    found = [(str(p.relative_to(ROOT)), command_lines(text_of(p))) for p in [*MARKDOWN, *SWEEPS]]
    found += help_examples().items()
    return [
        pytest.param(words, id=f"{where}: {' '.join(words)}"[:120])
        for where, lines in found
        for words in lines
    ]


def test_every_help_has_an_example():
    for name, lines in help_examples().items():
        assert lines and all(words[:2] == [cli.PROG, name] for words in lines), name


@pytest.mark.parametrize("words", commands())
def test_command_line_is_valid(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS
        return
    ours = words[1:] if words[0] == cli.PROG else words[2:] * (words[1:2] == ["region_pretrain"])
    if ours[1:] in ([], ["--help"]) and (ours or words == [cli.PROG]):  # a mention
        assert set(ours) <= {*cli.COMMANDS, "--help", "COMMAND"}
        return
    if len(words) == 1:  # a mention
        assert (ROOT / words[0]).is_file()
        return
    if len(words) == 2 and words[1].startswith("--"):  # an option is mentioned
        with pytest.raises(SystemExit):
            parse([words[0], "--help"], monkeypatch)
        assert words[1] in capsys.readouterr().out
        return
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in PLACEHOLDERS)
    words = [re.sub(pattern, lambda match: PLACEHOLDERS[match[0]], word) for word in words]
    try:
        args = parse(words, monkeypatch)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if getattr(args, "slurm", None):
        parse_slurm(args.slurm)
    if getattr(args, "config", None):
        load_sweep(args.config, args.opts)
    if getattr(args, "detector", None):
        config_of(args)
    elif getattr(args, "config_file", None):
        load_config(args.config_file, args.opts)


@functools.cache
def keys_of(paths: tuple[Path, ...]) -> set[str]:
    configs = (load_config(str(path)) for path in paths)
    return {key for c in configs for key in dotted_keys(OmegaConf.to_container(c, resolve=False))}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_inline_overrides_name_existing_keys(path):
    """Inline ``key=value``: a key of the method's configs, or on a general page of any config."""
    project = path.parent if path in METHODS else ROOT / "projects/*"
    patterns = [f"{project.relative_to(ROOT)}/configs/*_shapes.py", "configs/detection/*_shapes.py"]
    patterns += [f"{project.relative_to(ROOT)}/configs/*.py"] if path in METHODS else []
    known = keys_of(tuple(sorted({p for pattern in patterns for p in ROOT.glob(pattern)})))
    for code in _INLINE.findall(split(text_of(path))[1]):
        for word in code.split():
            match = re.fullmatch(r"(\+?)'?((?:train|model|dataloader|optimizer)\.[\w.]+)=.*", word)
            if match:
                key = match[2].rpartition(".")[0] if match[1] else match[2]
                assert key in known, code


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_inline_overrides_are_accepted_as_a_shell_passes_them_on(path):
    """It takes away the quotes of a list's items unless the whole word is quoted."""
    for code in _INLINE.findall(split(text_of(path))[1]):
        if re.match(r"""["']?\+?(train|model|dataloader|optimizer|lr_multiplier)\.[\w.]+=""", code):
            for word in shlex.split(code):
                if "=" in word and "..." not in word:
                    apply_overrides(OmegaConf.create(), ["+" + word.lstrip("+")])


def python_blocks() -> list:
    found = []
    for path in MARKDOWN:
        for language, code in split(text_of(path))[0]:
            first = code.lstrip().split(" ")[0]
            if language == "python" or not language and first in ("from", "import"):
                lines = code.splitlines()
                indent = len(lines[0]) - len(lines[0].lstrip())
                code = "\n".join(line[indent:] for line in lines)
                found.append(pytest.param(code, id=f"{path.relative_to(ROOT)}: {lines[0]}"))
    return found


@pytest.mark.parametrize("code", python_blocks())
def test_python_block_compiles_and_its_imports_work(code):
    tree = ast.parse(code)
    if code.startswith("# "):  # a file of the page's example, which has a test of its own
        return
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "<documentation>", "exec"), {})
    if code.startswith("sweep = "):
        namespace = {}
        exec(code, namespace)
        parse_sweep(namespace["sweep"], "documented")


def test_a_json_is_divided_without_a_rest(tmp_path, monkeypatch):
    """The page's example: each annotated image and box in one part, all categories in each."""
    page = text_of(ROOT / "docs/own_data.md")
    (code,) = (
        code for code in re.findall(r"```python\n(.+?)```", page, re.DOTALL) if "sample" in code
    )
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(500)]
    boxes = [{"id": i, "image_id": i % 450, "category_id": 1} for i in range(900)]
    whole = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "all.json").write_text(json.dumps(whole))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<documentation>", "exec"), {})
    parts = [
        json.loads((tmp_path / f"{n}.json").read_text()) for n in ("train", "held_out", "test")
    ]
    assert [len(part["images"]) for part in parts] == [270, 90, 90]
    for key, count in (("images", 450), ("annotations", 900)):
        found = sorted((entry for part in parts for entry in part[key]), key=lambda e: e["id"])
        assert found == whole[key][:count]
    for part in parts:
        ids = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= ids
        assert part["categories"] == whole["categories"]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path):
    for link in re.findall(r"\]\(([^)]+)\)", split(text_of(path))[1]):
        if not re.match(r"https?://", link):
            file, _, anchor = unquote(link).partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_documents_contain_what_is_checked():
    """The patterns above still find commands: a change of layout would silence these tests."""
    assert len(commands()) > 60 and len(python_blocks()) >= 4
    tools = {words[0] for param in commands() for words in param.values}
    assert {"make", "-m", "tools/pretrain_net.py", "tools/train_net.py", "tools/sweep.py"} <= tools
