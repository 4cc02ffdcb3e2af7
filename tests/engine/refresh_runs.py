"""Small runs whose regions are refreshed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.utils import comm
from tiny_run import KillAt

from region_pretrain.config import load_config
from region_pretrain.engine.build import build_model
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.refresh import RefreshedLoader

PROJECTS = Path(__file__).parents[2] / "projects"
#: Method -> its config, and overrides.
RECIPES = {
    "soco": (
        "SoCo/configs/soco_r18-fpn_b32_shapes.py",
        ["dataloader.train.dataset.views.sizes=[32,32,16]"],
    ),
    "ccop": ("CCOP/configs/ccop_r18-fpn_b32_shapes.py", []),
    "point": (
        "PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py",
        ["dataloader.train.dataset.views.maps.kind=boxes"],
    ),
}


def config(folder, images, store, *overrides, method="soco"):
    """8 iterations of 4 of 12 images: refreshed after 3 and 6 iterations."""
    recipe, own = RECIPES[method]
    return load_config(
        str(PROJECTS / recipe),
        [
            *own,
            f"train.output_dir={folder}",
            f"dataloader.train.dataset.names=folder://{images}",
            f"dataloader.train.dataset.regions={store}",
            "dataloader.train.total_batch_size=4",
            "dataloader.train.num_workers=0",
            "train.max_iter=8",
            "train.log_period=1",
            "train.pictures.period=0",
            "train.checkpointer.period=4",
            "train.checkpointer.max_to_keep=null",
            "train.device=cpu",
            "train.refresh_regions.epochs=1",
            "train.refresh_regions.batch_size=2",
            *overrides,
        ],
    )


def refresh_in_process(folder: str, images: str, store: str) -> None:
    """Compute the regions after an epoch; only the first process has the right statistics."""
    torch.set_num_threads(1)
    cfg = config(folder, images, store)
    os.makedirs(folder, exist_ok=True)
    loader = RefreshedLoader(
        instantiate(cfg.dataloader.train), cfg.train.refresh_regions, cfg.train.output_dir
    )
    model = build_model(cfg, torch.device("cpu"))
    loader.attach(model)
    next(model.target.parameters()).data.view(-1)[0] *= 1 + 2e-7 * comm.get_rank()  # rounding
    for name, buffer in model.target.named_buffers():
        if name.endswith("running_mean"):
            buffer += comm.get_rank()
    next(loader.iterate(3, 4))
    assert all(module.training for module in model.modules())


def train_in_process(folder: str, images: str, store: str, resume: bool) -> None:
    """A run of 5 iterations in one of the processes of a test, killed after that of KILL_AT."""
    torch.set_num_threads(1)
    cfg = config(folder, images, store, "train.max_iter=5")
    cfg.train.hooks = [L(KillAt)()]
    do_pretrain(cfg, resume)
