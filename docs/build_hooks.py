"""What the site needs beyond MkDocs: the projects' READMEs as pages, Sphinx roles as links."""

import base64
import io
import re
from pathlib import Path

import griffe
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def on_files(files, config):
    """Add the READMEs, which are outside ``docs/``."""
    for path in [
        ROOT / "README.md",
        *ROOT.glob("projects/README.md"),
        *ROOT.glob("projects/*/README.md"),
    ]:
        uri = path.relative_to(ROOT).as_posix() if path.parent != ROOT else "index.md"
        files.append(File.generated(config, uri, abs_src_path=str(path)))


def on_page_markdown(markdown, page, config, files):
    """Adapt relative links to the site, where ``docs/`` is the root."""
    if page.file.src_uri.startswith("projects/"):
        return markdown.replace("../docs/", "../")
    return re.sub(r"\]\((docs/|\.\./(?=projects/))", "](", markdown)


class Roles(griffe.Extension):
    """In docstrings: role -> link, or code where the page has no such entry; math -> image."""

    def on_package(self, *, pkg, loader, **kwargs):
        if pkg.path == "region_pretrain":
            for folder in ROOT.glob("projects/*/*/__init__.py"):
                loader.finder.insert_search_path(0, folder.parents[1])
                pkg["projects"].set_member(folder.parent.name, loader.load(folder.parent.name))
            self.rewrite(pkg, pkg)

    def rewrite(self, obj, package):
        if obj.docstring:
            text = re.sub(
                r"\.\. math:: (.+(?:\n +.+)*)|:math:`([^`]+)`", image, obj.docstring.value
            )
            text = re.sub(r":[a-z]+:`([^`]+)`", lambda m: link(m[1], obj, package), text)
            obj.docstring.value = re.sub("::$", ":", text, flags=re.MULTILINE)
        if obj.is_module:
            obj.exports = None  # what ``__init__`` re-exports is shown once, where it is defined
        for member in obj.members.values():
            if not member.is_alias:
                self.rewrite(member, package)


def link(role, obj, package):
    path = role.lstrip("~")
    name = path.rsplit(".", 1)[-1] if role.startswith("~") else path
    head, _, rest = path.partition(".")
    if head not in ("region_pretrain", "detectron2", "torch"):
        path = ".".join(filter(None, (obj.resolve(head), rest)))
    if not path.startswith("region_pretrain."):
        return f"`{name}`"
    target = package[path.partition(".")[2]]  # KeyError: the docstring names what does not exist
    return f"[`{name}`][{target.canonical_path}]" if target.docstring else f"`{name}`"


def image(match):
    latex, svg = re.sub(r"\s+", " ", match[1] or match[2]), io.BytesIO()
    style = {"prop": FontProperties(size=16 if match[1] else 12), "format": "svg"}
    mathtext.math_to_image(f"${latex.replace('frac', 'dfrac')}$", svg, **style)
    return f"![{latex}](data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()})"
