"""The library's rooms: each imports only earlier ones, and none names a method."""

import ast
from pathlib import Path

import pytest

import region_pretrain

PACKAGE = Path(region_pretrain.__file__).parent

#: Rooms and single files, in order. All of them may import ``region_pretrain`` itself.
ORDER = (
    "contract errors warnings shipped system random_state files json_files lease progress metrics "
    "tracking dataset_names registration overrides lazy yacs config zoo images regions data "
    "modeling convert solver engine evaluation reporting api jobs sweeps benchmark projects "
    "commands __main__"
).split()

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The library's modules that a file imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("region_pretrain"):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.startswith("region_pretrain"))
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_place():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_those_before_it(path):
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if mine == "__init__":
        return
    for module in imported(path):
        theirs = room(module)
        if theirs in ORDER:
            assert ORDER.index(theirs) <= ORDER.index(mine), f"{mine} imports {module}"


def test_modules_do_not_import_each_other_in_a_circle():
    modules = {
        ".".join(("region_pretrain", *p.relative_to(PACKAGE).with_suffix("").parts)): imported(p)
        for p in FILES
    }
    graph = {name: {m for m in found if m in modules} for name, found in modules.items()}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert not graph, f"circular imports among {sorted(graph)}"


def test_the_library_names_no_method():
    methods = {"soco", "ccop", "mcl", "plrc", "moco", "byol", "pointregioncontrast"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                used = {str(word).lower() for word in texts | names}
                assert not used & methods, f"{path}:{node.lineno} compares with a method's name"
        used = {module for module in imported(path) if room(module) == "projects"}
        assert not used, f"{path} imports {used}"
