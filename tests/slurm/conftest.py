"""A real SLURM of two nodes for these tests, which are skipped where it is not installed."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/engine")
sys.path[:0] = [TINY, str(Path(__file__).parent)]

_SPEC = importlib.util.spec_from_file_location("local_slurm", ROOT / "tools/local_slurm.py")
_TOOL = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TOOL)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running SLURM that this process and its children use."""
    if missing := _TOOL.missing_commands():
        message = f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(message)
        pytest.skip(message)
    folder = tmp_path_factory.mktemp("slurm")
    paths = [TINY, str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    with _TOOL.local_slurm(str(folder)) as env, pytest.MonkeyPatch.context() as patch:
        env |= {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
        for name, value in env.items():
            patch.setenv(name, value)
        yield env
