"""A run small enough for tests: everything that a real one has, in milliseconds a step."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.solver import LARS, cosine_momentum, pretrain_param_groups, warmup_cosine


@dataclass
class Batch:
    """(B, 6) vectors; splits and moves like a ``ViewBatch``."""

    x: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device, non_blocking: bool = False) -> Batch:
        return Batch(self.x.to(device, non_blocking=non_blocking))

    def chunk(self, n: int) -> list[Batch]:
        return [Batch(x) for x in self.x.tensor_split(n)]


class Loader:
    """Batch t is a function of (seed, t); a process gets its share of it."""

    def __init__(self, total_batch_size: int = 8, num_images: int = 40, seed: int | None = 0):
        self.total_batch_size = total_batch_size
        self.iterations_per_epoch = num_images // total_batch_size
        self.seed = seed

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[Batch]:
        torch.rand(1)  # as loaders that draw from the global generator when they start
        for t in range(start_iter, stop_iter):
            rng = np.random.default_rng((self.seed, t))
            x = rng.normal(size=(self.total_batch_size, 6)).astype(np.float32)
            rank, world = comm.get_rank(), comm.get_world_size()
            share = self.total_batch_size // world
            yield Batch(torch.from_numpy(x[rank * share : (rank + 1) * share]))


class TinyMethod(nn.Module):
    """BYOL in small: an online net, its EMA, a queue buffer, and (if wanted) random noise."""

    detector_modules = ("backbone",)

    def __init__(self, noise: float = 0.0, norm: bool = False, width: int = 5):
        super().__init__()
        layers = [nn.Linear(6, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh()]
        self.backbone = nn.Sequential(*layers)
        self.target = copy.deepcopy(self.backbone).requires_grad_(False)
        self.predictor = nn.Linear(width, width)
        self.register_buffer("queue", torch.zeros(4, width))
        self.noise = noise
        self.momentum = cosine_momentum(0.9)

    def before_step(self, iteration: int, max_iter: int) -> None:
        m = self.momentum(iteration / max_iter)
        with torch.no_grad():
            for p, q in zip(self.target.parameters(), self.backbone.parameters(), strict=True):
                p.lerp_(q, 1 - m)

    def after_step(self, iteration: int, max_iter: int) -> None:
        self.queue[iteration % 4] = self.backbone[0].bias.detach()

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        x = batch.x + self.noise * (torch.randn_like(batch.x) + random.random() + np.random.rand())
        p = self.predictor(self.backbone(x))
        with torch.no_grad():
            z = self.target(batch.x) + self.queue.mean(0)
        get_event_storage().put_scalar("online/embedding_std", p.std())
        return {"loss_main": (p - z).square().mean(), "loss_l2": 1e-3 * p.square().mean()}


class KillAt(HookBase):
    """Ends the process without warning, in the middle of a run."""

    def after_step(self) -> None:
        if self.trainer.iter == int(os.environ.get("KILL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)


class Poison(HookBase):
    """Makes a weight NaN before an iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            with torch.no_grad():
                self.trainer.module.predictor.bias[0] = float("nan")


def make_config(output_dir, **train) -> OmegaConf:
    """A pre-training config; keyword arguments replace keys of ``train``."""
    train = {
        "output_dir": str(output_dir),
        "epochs": 4,  # 4 * 40 images / 8 = 20 iterations
        "base_batch_size": 16,
        "device": "cpu",
        "log_period": 1,
        "checkpointer": {"period": 6, "keep_last": 2},
        **train,
    }
    return OmegaConf.create(
        {
            "model": L(TinyMethod)(noise=0.1),
            "dataloader": {"train": L(Loader)(total_batch_size=8, seed=None)},
            "optimizer": L(LARS)(params=L(pretrain_param_groups)(weight_decay=1e-3), lr=2.0),
            "lr_multiplier": L(warmup_cosine)(epochs="${train.epochs}", warmup_epochs=1),
            "train": train,
        },
        flags={"allow_objects": True},
    )


def train_in_process(output_dir: str, resume: bool, overrides: dict | None = None) -> None:
    """What the processes of a test run."""
    cfg = make_config(output_dir, **(overrides or {}))
    do_pretrain(cfg, resume)


if __name__ == "__main__":
    import json
    import sys

    train_in_process(sys.argv[1], sys.argv[2] == "resume", json.loads(sys.argv[3]))
