"""Helpers for the tests of several projects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import IDENTITY
from region_pretrain.overrides import apply_overrides


class Stop(Exception):
    """A run was stopped on purpose."""


@contextmanager
def stopped_in_step(number: int) -> Iterator[None]:
    """Stop the run in this context before step ``number`` (from 1) changes anything."""
    zero_grad, calls = torch.optim.Optimizer.zero_grad, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Stop
        return zero_grad(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch.optim.Optimizer, "zero_grad", stop)
        yield


def six_steps(recipe: Path, images: Path, folder: Path, *overrides: str) -> DictConfig:
    """A recipe's config for six steps on a folder of images, with a checkpoint every two.

    Args:
        recipe: path of the recipe.
        images: folder of the images.
        folder: output folder.
        overrides: further ones, which take precedence.
    """
    return apply_overrides(
        LazyConfig.load(str(recipe)),
        [
            f"train.output_dir={folder}",
            f"dataloader.train.dataset.names=folder://{images}",
            "dataloader.train.total_batch_size=4",
            "dataloader.train.num_workers=0",
            "train.max_iter=6",
            "train.log_period=1",
            "train.checkpointer.period=2",
            "train.device=cpu",
            *overrides,
        ],
    )


def losses(folder: Path) -> dict[int, float]:
    """``total_loss`` by iteration."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def check_stopped_run_resumes(run: Callable[..., Path]) -> None:
    """Check that a run of six steps, stopped in the fifth and resumed, equals one in one go.

    Args:
        run: ``run(name, resume=False)`` trains six steps and returns the output folder.
    """
    whole = run("whole")
    with stopped_in_step(5):
        run("parts")
    parts = run("parts", resume=True)
    assert "Starting training from iteration 4" in (parts / "log.txt").read_text()
    assert sorted(losses(whole)) == list(range(6)) and losses(parts) == losses(whole)
    first, second = (torch.load(f / "model_final.pth", weights_only=True) for f in (whole, parts))
    for part in ("model", "pretraining"):
        assert first[part].keys() == second[part].keys() and first[part]
        for name, value in first[part].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[part][name])), name


def two_view_batch(batch: int = 4, seed: int = 0) -> ViewBatch:
    """Two views of 32 pixels of random noise, without regions, for image-level methods."""
    rng = np.random.default_rng(seed)
    views = [
        View(
            images=torch.from_numpy(rng.integers(0, 256, (batch, 3, 32, 32), dtype=np.uint8)),
            boxes=torch.zeros(batch, 0, 4),
            valid=torch.zeros(batch, 0, dtype=torch.bool),
            region_ids=torch.zeros(batch, 0, dtype=torch.int64),
            affine=torch.zeros(batch, 2, 3),
            photometry=torch.from_numpy(np.tile(IDENTITY, (batch, 1))),
        )
        for _ in range(2)
    ]
    return ViewBatch(views, torch.arange(batch))
