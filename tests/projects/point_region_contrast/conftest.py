"""A small model, and batches of its views."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from fvcore.common.param_scheduler import ConstantParamScheduler

from region_pretrain.config import get_config
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.photometry import Photometry
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.point_region_contrast import (
    AffinityDistillation,
    AffinityHead,
    PointContrast,
    PointRegionContrast,
    PointRegionViews,
)
from region_pretrain.projects.point_region_contrast.maps import region_maps

DIM = 16


@pytest.fixture(scope="session")
def noise_folder(tmp_path_factory):
    """Twelve images of 96 x 80 pixels of smooth noise."""
    folder = tmp_path_factory.mktemp("noise")
    for i in range(12):
        coarse = np.random.default_rng(i).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i:02d}.png"), cv2.resize(coarse, (96, 80)))
    return folder


@pytest.fixture(scope="session")
def make_views():
    """Small views; keyword arguments override their settings."""

    def make(kind: str = "grid", options=None, **overrides) -> PointRegionViews:
        arguments = dict(
            size=64,
            photometry=Photometry(),
            maps=region_maps(kind, **(options or {})),
            num_regions=8,
            points=3,
            cells=16,
            pairs=10,
        )
        return PointRegionViews(**{**arguments, **overrides})

    return make


@pytest.fixture(scope="session")
def make_batch(noise_folder, make_views):
    """``make_batch(count, **settings of the views)``: a batch of the folder's first images."""

    def make(count: int = 4, **overrides):
        dataset = PretrainDataset(f"folder://{noise_folder}", make_views(**overrides))
        return dataset.batch(0, 0, range(count))

    return make


@pytest.fixture(scope="session")
def small_model():
    """Builds the method around the small detector; keyword arguments override its config."""

    def build(seed: int = 0, fpn: str = "", prototypes: int = 0, **overrides):
        torch.manual_seed(seed)
        detector = get_config("common/models/mask_rcnn_fpn_small.py").model
        channels = 48 if fpn else 192
        arguments = dict(
            backbone=instantiate(detector.backbone),
            feature=fpn or "res5",
            head=MLPHead(channels, 32, DIM, norm=""),
            affinity_head=AffinityHead(channels, 32, DIM, prototypes=prototypes),
            queue=KeyQueue(20, DIM),
            contrast=PointContrast(),
            distillation=AffinityDistillation(cells=8, prototypes=prototypes),
            momentum=ConstantParamScheduler(0.9),
            zero_init=False,
            pixel_mean=detector.pixel_mean,
            pixel_std=detector.pixel_std,
            input_format="RGB",
        )
        if not fpn:
            arguments["backbone"] = Trunk(bottom_up=arguments["backbone"].bottom_up)
        return PointRegionContrast(**{**arguments, **overrides})

    return build
