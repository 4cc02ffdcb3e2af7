"""Two processes on two GPUs compute what two processes on the CPU compute."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from region_pretrain.benchmark.images import make_jpegs
from region_pretrain.config import load_config

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    names, store = make_jpegs(str(tmp_path_factory.mktemp("images")), 8, (128, 96))
    key = "dataloader.train.dataset"
    return [f"{key}.names={names}", f"{key}.regions={store}", f"{key}.recipe=null"]


def first_losses(config: str, data: list[str], output: Path, device: str) -> dict[str, float]:
    overrides = [
        *("train.max_iter=2", "train.log_period=1", "train.amp.enabled=False"),
        *("train.float32_matmul_precision=highest", "train.cudnn_benchmark=False"),
        *("dataloader.train.total_batch_size=8", "dataloader.train.num_workers=0"),
        *(f"train.output_dir={output}", f"train.device={device}"),
    ]
    command = [sys.executable, "tools/pretrain_net.py", "--config-file", config, "--num-gpus", "2"]
    done = subprocess.run(
        [*command, *overrides, *data], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads((output / "metrics.json").read_text().splitlines()[0])
    return {name: value for name, value in line.items() if "loss" in name}


def test_losses_are_those_of_two_processes_on_the_cpu(unlabelled_config, data, tmp_path):
    cfg = load_config(unlabelled_config, [])
    if not cfg.dataloader.train.dataset.get("regions"):
        data = data[:1]
    on_gpus = first_losses(unlabelled_config, data, tmp_path / "gpu", "cuda")
    on_cpu = first_losses(unlabelled_config, data, tmp_path / "cpu", "cpu")
    # Convolutions use TF32. Dropout draws other numbers on a GPU.
    rel, abs_ = (0.2, 0.2) if "'dropout': 0.1" in str(cfg.model) else (0.01, 0.005)
    assert on_gpus == pytest.approx(on_cpu, rel=rel, abs=abs_)
