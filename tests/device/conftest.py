"""Runs the scripts of this folder in processes of their own, which can have a simulated device."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from region_pretrain.benchmark.images import make_jpegs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Every Shapes recipe, relative to the repository.
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("projects/*/configs/*shapes.py"))


@pytest.fixture(scope="session")
def configs() -> list[str]:
    return CONFIGS


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    """What ``steps.py`` trains on: rendering takes longer than its steps."""
    folder = str(tmp_path_factory.mktemp("images"))
    make_jpegs(folder, 4, (128, 96))
    return folder


@pytest.fixture(scope="session")
def run_scripts() -> Callable[[list[list[str]]], None]:
    """Start scripts of this folder together, and wait until all have succeeded."""

    def run(commands: list[list[str]]) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        processes = [
            subprocess.Popen(
                [sys.executable, HERE / script, *arguments],
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for script, *arguments in commands
        ]
        try:
            outputs = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output[-3000:]

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "config" in metafunc.fixturenames:
        configs = getattr(metafunc.module, "CONFIGS", CONFIGS)
        metafunc.parametrize("config", configs, ids=lambda c: Path(c).stem)
