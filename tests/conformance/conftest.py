"""What the conformance tests of all methods share."""

import sys
from pathlib import Path

import pytest

# Where tests, and the processes that they start, find ``training_step`` and ``parts``.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    from training_step import TwoProcesses

    processes = TwoProcesses(tmp_path_factory.mktemp("two_processes"))
    yield processes
    processes.close()
