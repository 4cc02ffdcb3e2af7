"""A small CCOP and batches for it."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from fvcore.common.param_scheduler import ConstantParamScheduler

from region_pretrain.config import get_config
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import IDENTITY
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.projects.ccop import CCOP, Curriculum

DIM = 16


@pytest.fixture(scope="session")
def small_ccop():
    """Builds CCOP around the small detector; keyword arguments override its config."""

    def build(seed: int = 0, dropout: float = 0.1, **overrides):
        torch.manual_seed(seed)
        detector = get_config("common/models/mask_rcnn_fpn_small.py").model
        head = dict(hidden_dim=32, output_dim=DIM, norm="", dropout=dropout)
        arguments = dict(
            backbone=instantiate(detector.backbone),
            trunk_feature="res5",
            in_features=["p2", "p3", "p4", "p5"],
            pooler=instantiate(detector.roi_heads.box_pooler),
            image_head=MLPHead(192, **head),
            region_head=MLPHead(48 * 49, **head),
            image_queue=KeyQueue(20, DIM),
            region_queue=KeyQueue(30, DIM),
            curriculum=Curriculum(),
            momentum=ConstantParamScheduler(0.9),
            level_scales=(16, 32, 60, 64),
            pixel_mean=detector.pixel_mean,
            pixel_std=detector.pixel_std,
            input_format="RGB",
        )
        return CCOP(**{**arguments, **overrides})

    return build


@pytest.fixture(scope="session")
def make_batch():
    """``make_batch(counts)``: random images with ``counts`` random regions."""

    def make(counts=(3, 5, 1, 2), size: int = 64, slots: int = 6, seed: int = 0) -> ViewBatch:
        rng = np.random.default_rng(seed)
        batch = len(counts)
        valid = torch.arange(slots)[None] < torch.tensor(counts)[:, None]
        ids = torch.arange(slots).repeat(batch, 1)
        views = []
        for _ in range(2):
            images = rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
            lo = rng.uniform(0, size - 18, (batch, slots, 2))
            hi = np.minimum(lo + rng.uniform(12, size, (batch, slots, 2)), size - 1)
            boxes = torch.from_numpy(np.concatenate([lo, hi], axis=2).astype(np.float32))
            views.append(
                View(
                    images=torch.from_numpy(images),
                    boxes=torch.where(valid[..., None], boxes, 0.0),
                    valid=valid,
                    region_ids=torch.where(valid, ids, 0),
                    affine=torch.zeros(batch, 2, 3),
                    photometry=torch.from_numpy(np.tile(IDENTITY, (batch, 1))),
                )
            )
        return ViewBatch(views, torch.arange(10, 10 + batch))

    return make
