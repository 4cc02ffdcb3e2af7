"""Optimiser steps of a config on the CPU and on the simulated device.

    python steps.py FOLDER IMAGES CONFIG...                      # one process
    python steps.py FOLDER IMAGES CONFIG... --rank 0 --world 2   # one of several

writes ``FOLDER/RANK.json``: config -> part of the data -> :func:`compare`. IMAGES is a folder in
which ``make_jpegs`` has written as many images as a batch has. With several processes,
those of a method with regions are run with unequal numbers of regions, and with none in the last.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from collectives import DeviceGroup
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from simulated import RECORD, Simulation, _pinned, install
from torch import distributed as dist

from region_pretrain.benchmark.measure import synthetic_batch, use_images
from region_pretrain.config import load_config
from region_pretrain.engine.build import build_model, build_optimizer, clipping
from region_pretrain.engine.trainer import Trainer

STEPS, BATCH = 2, 4


class AverageGradients(HookBase):
    """What DDP does after the backward pass, with one collective."""

    def after_backward(self) -> None:
        gradients = [p.grad for p in self.trainer.model.parameters() if p.requires_grad]
        if any(g is None for g in gradients):
            return  # reported as missing
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def load(config: str, folder: str):
    """A recipe that trains on the images of ``make_jpegs`` in a folder, and a batch of it."""
    cfg = load_config(config, ["train.amp.enabled=False"])
    use_images(cfg, f"folder://{folder}/images", f"{folder}/regions.arrow")
    return cfg, synthetic_batch(cfg, BATCH)


def train(cfg, batch, device: torch.device, steps: int, amp_dtype=None) -> dict:
    """Train for some steps, none of which is a log step.

    Returns:
        ``losses`` of each step; trained parameters ``without_gradient``; on the device also the
        fields of :class:`~simulated.Record`, with the kernels of the last step only.
    """
    model = build_model(cfg, device)
    batch = batch.pin_memory() if device.type != "cpu" else batch
    trainer = Trainer(
        model,
        build_optimizer(cfg, model, 0.05),
        lambda start, stop: (batch for _ in range(start, stop)),
        device=device,
        amp_dtype=amp_dtype,
        log_period=1 << 30,
        **clipping(cfg.train.clip_grad),
    )
    trainer.start_iter, trainer.iter, trainer.max_iter = 0, 0, 1 << 30
    if dist.is_initialized():
        trainer.register_hooks([AverageGradients()])
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        RECORD.clear()  # building the model waits
        for trainer.iter in range(steps):
            RECORD.kernels.clear()
            trainer.run_step()
    seen = {name: dict(counter) for name, counter in vars(RECORD).items()}
    return {
        **seen,
        "losses": [values.tolist() for _, _, values in trainer._unchecked],
        "without_gradient": [
            name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
        ],
    }


def compare(cfg, batch, device: torch.device, group: DeviceGroup | None) -> dict:
    """Losses on CPU and device, and what the device recorded in float32 and under autocast."""
    on_cpu = train(cfg, batch, torch.device("cpu"), STEPS)
    found = {"cpu": on_cpu["losses"]}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        _pinned.clear()
        with Simulation(), group or Simulation():
            found[name] = train(cfg, batch, device, STEPS if dtype is None else 1, dtype)
        found[name]["collectives"] = group.calls() if group else []
    return found


def without_regions(batch):
    """A batch in which no slot contains a region."""
    views = [replace(view, valid=torch.zeros_like(view.valid)) for view in batch.views]
    return replace(batch, views=views)


def fewer_regions(batch):
    """A batch in which the first image has no region, and the others a third of theirs."""
    views = []
    for view in batch.views:
        valid = view.valid & (view.region_ids % 3 == 0)
        valid[0] = False
        views.append(replace(view, valid=valid))
    return replace(batch, views=views)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("images")
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    group = None
    if args.world > 1:
        meet = f"file://{args.folder}/meet"
        dist.init_process_group("gloo", meet, rank=args.rank, world_size=args.world)
        group = DeviceGroup()
    device = install()
    found = {}
    for config in args.configs:
        cfg, batch = load(config, args.images)
        parts = {"all": batch.chunk(args.world)[args.rank]}
        if group and any(view.valid.shape[1] > 1 for view in batch.views):
            mine = parts.pop("all")
            last = args.rank == args.world - 1
            parts["unequal"] = fewer_regions(mine) if last else mine
            parts["empty"] = without_regions(mine) if last else mine
        found[config] = {
            name: compare(copy.deepcopy(cfg), part, device, group) for name, part in parts.items()
        }
    (args.folder / f"{args.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
