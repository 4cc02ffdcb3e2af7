"""Fault tests use the tiny runs of the engine's tests, also in the processes that they start."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = [str(TESTS / "faults"), str(TESTS / "engine")]
sys.path[:0] = FOLDERS


@pytest.fixture(autouse=True, scope="session")
def _children_find_the_tiny_runs():
    paths = [*FOLDERS, str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
