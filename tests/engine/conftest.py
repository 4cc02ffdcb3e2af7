"""Puts ``tiny_run`` where configs and child processes can import it by name."""

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)


@pytest.fixture(autouse=True)
def _children_find_tiny_run(monkeypatch):
    root = str(Path(__file__).parents[2])
    paths = [HERE, root, os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
