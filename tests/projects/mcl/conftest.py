"""A small MCL and batches for it: canvases of 64 pixels, windows of 2 x 2, all four levels."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import IDENTITY
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.projects.mcl import MCL, Montage, SupervisedMCL
from region_pretrain.solver import cosine_momentum


@pytest.fixture
def small_montage():
    """Tiles of 64, 32, 16 and 8 pixels."""

    def build(**overrides) -> Montage:
        return Montage(**{"size": 64, **overrides})

    return build


@pytest.fixture
def small_mcl(small_montage):
    """Builds MCL around the small detector; keyword arguments override its config."""

    def build(seed: int = 0, fc: bool = False, supervised: bool = False, **overrides):
        torch.manual_seed(seed)
        detector = copy.deepcopy(get_config("common/models/mask_rcnn_fpn_small.py").model)
        heads = detector.roi_heads
        heads.box_pooler.output_size = 2
        heads.box_head.input_shape.height = heads.box_head.input_shape.width = 2
        if not fc:
            heads.box_head.fc_dims = []
        width = 256 if fc else 48
        arguments = dict(
            backbone=instantiate(detector.backbone),
            pooler=instantiate(heads.box_pooler),
            head=instantiate(heads.box_head),
            montage=small_montage(),
            pixel_mean=detector.pixel_mean,
            pixel_std=detector.pixel_std,
            input_format="RGB",
        )
        if supervised:
            arguments |= dict(classifier=nn.Linear(width, 5))
            return SupervisedMCL(**{**arguments, **overrides})
        arguments |= dict(
            projector=MLPHead(width, 32, 16, final_norm=True),
            predictor=MLPHead(16, 32, 16),
            momentum=cosine_momentum(0.99),
        )
        return MCL(**{**arguments, **overrides})

    return build


@pytest.fixture
def make_batch():
    """Random images: ``make_batch(batch, size, views, seed)``."""

    def make(batch: int = 4, size: int = 64, views: int = 8, seed: int = 0) -> ViewBatch:
        rng = np.random.default_rng(seed)
        made = []
        for _ in range(views):
            # Blocks of 8 pixels: shrunk images remain distinguishable.
            coarse = rng.integers(0, 256, (batch, 3, size // 8, size // 8), dtype=np.uint8)
            images = coarse.repeat(8, axis=2).repeat(8, axis=3)
            made.append(
                View(
                    images=torch.from_numpy(images),
                    boxes=torch.zeros(batch, 1, 4),
                    valid=torch.ones(batch, 1, dtype=torch.bool),
                    region_ids=torch.zeros(batch, 1, dtype=torch.int64),
                    affine=torch.zeros(batch, 2, 3),
                    photometry=torch.from_numpy(np.tile(IDENTITY, (batch, 1))),
                )
            )
        return ViewBatch(made, torch.arange(batch), torch.arange(batch) % 5)

    return make
