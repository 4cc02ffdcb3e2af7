"""Tests on a real GPU, run by ``make test-gpu`` only. Those of two GPUs need two."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "device"), str(HERE.parent / "engine")]
#: Every Shapes recipe.
CONFIGS = sorted(ROOT.glob("projects/*/configs/*shapes.py"))
_not_run: list[str] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # A loader of synthetic images has no labels.
    unlabelled = [path for path in CONFIGS if "labels = True" not in path.read_text()]
    # Compiling takes a minute each: a trunk alone, and one with a pyramid.
    compiled = [path for path in CONFIGS if path.stem.startswith(("moco-v2_r18", "soco_r18-fpn"))]
    by_fixture = {"config": CONFIGS, "unlabelled_config": unlabelled, "compiled_config": compiled}
    for name, paths in by_fixture.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [str(p) for p in paths], ids=[p.stem for p in paths])


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.device_count() >= 2:
        return
    missing = [item for item in items if item.get_closest_marker("two_gpus")]
    _not_run.extend(item.nodeid for item in missing)
    config.hook.pytest_deselected(items=missing)
    items[:] = [item for item in items if item not in missing]


def pytest_terminal_summary(terminalreporter) -> None:
    if _not_run:
        found = torch.cuda.device_count()
        terminalreporter.section("NOT RUN: these need two GPUs")
        terminalreporter.write_line(f"This machine has {found}.")
        for name in _not_run:
            terminalreporter.write_line(name)
