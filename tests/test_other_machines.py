"""Machines without fork, /proc, fcntl, resource or SIGUSR2: macOS and Windows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from region_pretrain.engine import build
from region_pretrain.errors import UserError


def test_everything_imports_and_trains_on_another_machine(tmp_path):
    script = Path(__file__).with_name("other_machine.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = (tmp_path / "pre/metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 1
    assert "bbox" in json.loads((tmp_path / "det/results.json").read_text())


def test_the_gpu_of_a_mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = build.resolve_device("mps")
    assert device == torch.device("mps")
    assert build.resolve_device("cuda").type != "mps"  # only on request
    amp = {"enabled": True, "dtype": "float16"}
    assert build.amp_dtype(amp, device) == torch.bfloat16
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(UserError, match="train.device=mps: an Apple GPU trains in one process"):
        build.resolve_device("mps")


def test_a_job_whose_gpus_pytorch_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        monkeypatch.delenv(name, raising=False)
    assert build.resolve_device("cuda") == torch.device("cpu")  # as on any machine without one
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    assert build.resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", None):
        with pytest.raises(
            UserError, match=r"SLURM gave this job GPUs \(0,1\), but PyTorch finds n"
        ):
            build.resolve_device(name)


def test_a_machine_without_an_apple_gpu_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        build.resolve_device("mps")
    assert str(error.value) == (
        "train.device=mps: PyTorch finds no Apple GPU; set train.device=cpu"
    )
    with pytest.raises(UserError, match="train.device=tpu: must be cuda, mps, cpu or null"):
        build.resolve_device("tpu")
