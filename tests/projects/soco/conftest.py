"""A small SoCo and batches for it."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate

from region_pretrain.config import get_config
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import IDENTITY
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.projects.soco import SoCo
from region_pretrain.solver import cosine_momentum


@pytest.fixture
def small_soco():
    """Builds SoCo around the small detector; keyword arguments override its config."""

    def build(sources=("crop", "crop"), seed: int = 0, **overrides):
        torch.manual_seed(seed)
        detector = get_config("common/models/mask_rcnn_fpn_small.py").model
        arguments = dict(
            backbone=instantiate(detector.backbone),
            in_features=["p2", "p3", "p4", "p5"],
            pooler=instantiate(detector.roi_heads.box_pooler),
            head=instantiate(detector.roi_heads.box_head),
            projector=MLPHead(256, 64, 32),
            predictor=MLPHead(32, 64, 32),
            momentum=cosine_momentum(0.99),
            sources=list(sources),
            pixel_mean=detector.pixel_mean,
            pixel_std=detector.pixel_std,
            input_format="RGB",
        )
        return SoCo(**{**arguments, **overrides})

    return build


@pytest.fixture
def make_batch():
    """Random images and boxes: ``make_batch(batch, sizes, slots, seed)``."""

    def make(batch: int = 4, sizes=(224, 224, 112), slots=(8, 4, 4), seed: int = 0) -> ViewBatch:
        rng = np.random.default_rng(seed)
        views = []
        for size, count in zip(sizes, slots, strict=True):
            images = rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
            corners = rng.uniform(0, size, (batch, count, 2, 2))
            boxes = np.concatenate([corners.min(2), corners.max(2)], axis=2).astype(np.float32)
            ids = np.tile(np.arange(count) % 4, (batch, 1))
            views.append(
                View(
                    images=torch.from_numpy(images),
                    boxes=torch.from_numpy(boxes),
                    valid=torch.ones(batch, count, dtype=torch.bool),
                    region_ids=torch.from_numpy(ids),
                    affine=torch.zeros(batch, 2, 3),
                    photometry=torch.from_numpy(np.tile(IDENTITY, (batch, 1))),
                )
            )
        return ViewBatch(views, torch.arange(batch))

    return make
