"""``region-pretrain``: its overview, unknown commands and completion."""

import subprocess
import sys
from pathlib import Path

import pytest

from region_pretrain.commands import cli, completion

COMMANDS = Path(cli.__file__).parent


def test_every_module_is_a_command():
    modules = {path.stem for path in COMMANDS.glob("*.py")} - {"__init__", "cli"}
    assert modules == {module for module, _ in cli.COMMANDS.values()}


def test_the_overview_has_one_line_per_command_and_imports_nothing_heavy(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, what) in cli.COMMANDS.items():
        assert f"  {name:<18} {what}" in lines
    code = (
        "import sys\n"
        "from region_pretrain.commands import cli\n"
        "cli.main([])\n"
        "heavy = {'torch', 'numpy', 'detectron2', 'omegaconf', 'cv2'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("word", "hint"),
    [("pretran", "did you mean pretrain?"), ("xyz", "see region-pretrain --help")],
)
def test_an_unknown_command_is_one_line(word, hint, capsys):
    assert cli.main([word]) == 2
    error = f"error: region-pretrain has no command {word}; {hint}\n"
    assert capsys.readouterr() == ("", error)


def test_the_demo_is_a_sweep_that_can_be_overridden(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr("region_pretrain.commands.sweep.main", lambda *args: started.append(args))
    cli.main(["demo", "sweep.seeds=[0,1]"])
    words = ["--config", "configs/sweeps/demo.py", "--wait", "sweep.seeds=[0,1]"]
    assert started == [(words, "region-pretrain sweep")]


def complete(script: str, line: str, cwd: Path) -> list[str]:
    """What bash offers for a command line whose last word is incomplete."""
    code = f"""
source {script}
COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
complete_function=$(complete -p region-pretrain | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$complete_function region-pretrain "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=cwd)
    return done.stdout.split()


def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    completion.main(["bash"])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "mine.py").write_text("")
    assert complete(script, "region-pretrain pre", tmp_path) == ["pretrain"]
    assert complete(script, "region-pretrain regions --im", tmp_path) == ["--images"]
    assert "mine.py" in complete(script, "region-pretrain pretrain --config-file mi", tmp_path)


def test_the_script_of_zsh_names_every_command(capsys):
    completion.main(["zsh"])
    script = capsys.readouterr().out
    assert script.startswith("#compdef region-pretrain")
    for name, (_, what) in cli.COMMANDS.items():
        assert f"    {name}:'" in script and what.partition("'")[0] in script
