"""A real SLURM of two nodes for these tests; without its programs they are skipped."""

import os
import sys
from pathlib import Path

import pytest

from region_pretrain.jobs.local_slurm import local_slurm, missing_commands

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/engine")
sys.path[:0] = [TINY, str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """SLURM is up, and this process and its children talk to it."""
    if missing := missing_commands():
        message = f"no SLURM here ({', '.join(missing)}): apt-get install slurm-wlm munge"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(message)
        pytest.skip(message)
    folder = tmp_path_factory.mktemp("slurm")
    paths = [TINY, str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    with local_slurm(str(folder)) as env, pytest.MonkeyPatch.context() as patch:
        env |= {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
        for name, value in env.items():
            patch.setenv(name, value)
        yield env
