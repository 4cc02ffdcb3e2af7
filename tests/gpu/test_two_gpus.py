"""Two processes on two GPUs compute what two processes on the CPU compute."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from region_pretrain.benchmark.images import make_jpegs
from region_pretrain.config import load_config
from region_pretrain.errors import STOPPED

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus]

ROOT = Path(__file__).parents[2]
#: Of ``uneven`` and ``tiny_run``, for the processes.
MODULES = [str(ROOT / "tests" / name) for name in ("gpu", "engine")]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    names, store = make_jpegs(str(tmp_path_factory.mktemp("images")), 8, (128, 96))
    key = "dataloader.train.dataset"
    return [f"{key}.names={names}", f"{key}.regions={store}", f"{key}.recipe=null"]


@pytest.fixture
def data(unlabelled_config, files) -> list[str]:
    """Overrides: the images, and regions if the method has some."""
    cfg = load_config(unlabelled_config, [])
    return files if cfg.dataloader.train.dataset.get("regions") else files[:1]


def train(
    config: str, output: Path, device: str, *words: str, tell_at: int = -1
) -> list[dict[str, float]]:
    """Train with two processes.

    Args:
        config: the recipe.
        output: the run's folder.
        device: ``cuda`` or ``cpu``.
        words: further overrides, and flags.
        tell_at: iteration after which the last process is told to stop; -1: none.

    Returns:
        The losses of each iteration.
    """
    overrides = [
        *("train.max_iter=2", "train.log_period=1", "train.amp.enabled=False"),
        *("train.float32_matmul_precision=highest", "train.cudnn_benchmark=False"),
        *("dataloader.train.total_batch_size=8", "dataloader.train.num_workers=0"),
        *(f"train.output_dir={output}", f"train.device={device}"),
    ]
    command = [sys.executable, "tools/pretrain_net.py", "--config-file", config, "--num-gpus", "2"]
    path = os.pathsep.join([*MODULES, str(ROOT)])
    done = subprocess.run(
        [*command, *overrides, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path, "TELL_AT": str(tell_at)},
    )
    assert done.returncode == (0 if tell_at < 0 else STOPPED), done.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "loss" in name} for line in lines]


def check_devices(config: str, folder: Path, *words: str) -> None:
    """Compare the first losses on two GPUs with those of two processes on the CPU."""
    on_gpus = train(config, folder / "gpu", "cuda", *words)[0]
    on_cpu = train(config, folder / "cpu", "cpu", *words)[0]
    # Convolutions use TF32. Dropout draws other numbers on a GPU.
    rel, abs_ = (0.01, 0.005)
    if "'dropout': 0.1" in str(load_config(config, []).model):
        rel, abs_ = (0.2, 0.2)
    assert on_gpus == pytest.approx(on_cpu, rel=rel, abs=abs_)


def test_losses_are_those_of_two_processes_on_the_cpu(unlabelled_config, data, tmp_path):
    check_devices(unlabelled_config, tmp_path, *data)


def test_also_if_a_process_has_no_regions(unlabelled_config, data, tmp_path):
    if len(data) == 1:
        pytest.skip("a method without regions")
    uneven = "dataloader.train._target_=uneven.EmptyOnLastRank"
    check_devices(unlabelled_config, tmp_path, *data, uneven)


def test_a_run_that_is_stopped_and_resumed_follows_an_uninterrupted_one(
    unlabelled_config, data, tmp_path
):
    """The first loss after a checkpoint is equal; sums of atomic additions change later ones."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = [*data, "train.max_iter=6", "train.checkpointer.period=2"]
    words += ["train.checkpointer.max_to_keep=null", "train.hooks=[{_target_: tiny_run.TellAt}]"]
    expected = train(unlabelled_config, whole, "cuda", *words)
    assert len(expected) == 6
    shutil.copytree(whole, stopped)
    for name in ("model_final.pth", "model_0000005.pth", "model_0000003.pth"):
        (stopped / name).unlink(missing_ok=True)
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    found = train(unlabelled_config, stopped, "cuda", *words, "--resume", tell_at=2)
    assert len(found) in (3, 4)  # the processes agree on a step
    assert found[:2] == expected[:2] and found[2] == pytest.approx(expected[2], rel=1e-6)
    again = train(unlabelled_config, stopped, "cuda", *words, "--resume")
    assert len(again) == 6 and again[: len(found)] == found
    assert again[3] == pytest.approx(expected[3], rel=1e-2)
