"""Docstrings as the API reference shows them."""

import importlib.util
import re
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def package() -> griffe.Module:
    spec = importlib.util.spec_from_file_location("build_hooks", ROOT / "docs/build_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return griffe.load(
        "region_pretrain",
        search_paths=[ROOT],
        extensions=griffe.load_extensions(hooks.Roles()),
        docstring_parser="google",
        docstring_options={"warn_unknown_params": False, "warn_missing_types": False},
    )


def documented(obj: griffe.Object):
    for member in obj.members.values():
        if not member.is_alias:
            if member.docstring:
                yield member
            yield from documented(member)


def test_arguments_and_attributes_exist(package):
    """``Args:``, and a dataclass's ``Attributes:``, name real ones; ``a, b:`` names two."""
    checked = 0
    for obj in documented(package):
        function = obj if obj.is_function else obj.all_members.get("__init__")
        known = {p.name.lstrip("*") for p in function.parameters} if function else set()
        known |= set(obj.all_members) if obj.is_class else set()
        # A module's attributes may be buffers, which are not in its source as such.
        kinds = ("parameters", "attributes") if "dataclass" in obj.labels else ("parameters",)
        for section in obj.docstring.parsed:
            if section.kind.value in kinds:
                for entry in section.value:
                    names = set(re.findall(r"\w+", entry.name))
                    assert names <= known, f"{obj.path}: {names - known} not in {sorted(known)}"
                    checked += 1
    assert checked > 400


def test_roles_and_math_are_rendered(package):
    """Roles become links to entries that exist, math becomes images, for methods as well."""
    links = set()
    for obj in documented(package):
        text = obj.docstring.value
        assert not re.search(r":\w+:`|\.\. math::|::$", text, re.MULTILINE), obj.path
        links |= set(re.findall(r"`\]\[([\w.]+)\]", text))
    assert len(links) > 40
    assert all(package[link.partition(".")[2]].docstring for link in links)
    assert any(link.startswith("region_pretrain.projects.") for link in links)
    assert "data:image/svg" in package["modeling.losses.info_nce"].docstring.value
