"""Fault tests use the tiny runs and fake sweeps of other tests, also in their child processes."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = [str(TESTS / name) for name in ("", "faults", "engine", "sweeps", "projects")]
sys.path[:0] = FOLDERS

from fake_sweeps import sweeps  # noqa: E402, F401  a fixture


@pytest.fixture(autouse=True, scope="session")
def _children_find_the_tiny_runs():
    paths = [*FOLDERS, str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
