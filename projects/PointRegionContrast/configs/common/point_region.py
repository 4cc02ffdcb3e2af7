"""What all point-level region contrast recipes share. Leaves choose detector, data and length."""

from typing import Any

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.modeling.detector import has, last_map, require
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

_shared = get_config("common/moco_family.py")
optimizer, lr_multiplier, train = _shared.optimizer, _shared.lr_multiplier, _shared.train
dataloader = _shared.dataloader

dataloader.train.dataset.views = L(PointRegionViews)(
    size=224,
    photometry=_shared.photometry,
    maps=L(region_maps)(kind="grid"),  # 4 x 4 cells of the image
    num_regions=16,
    points=16,
    positives="region",
    cells=56,  # of 4 x 4 pixels
    pairs=256,
    crop_area=(0.2, 1.0),
    min_overlap=0.5,
    max_draws=101,
)


def pretrain(detector: DictConfig) -> DictConfig:
    """Point-level region contrast for 200 epochs (``--method point_region``).

    On P4 of an R-CNN with FPN, res5 of a C4 detector, or the trunk of another detector with FPN.

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=200, output_dir="output/point_region")
    if has(detector, "roi_heads.res5"):
        return point_region_c4(detector)
    require(
        detector,
        "backbone.bottom_up",
        otherwise="point-level region contrast needs an FPN or C4; use --method soco",
    )
    if has(detector, "roi_heads.box_pooler"):
        return point_region_fpn(detector)
    feature, channels = last_map(detector.backbone.bottom_up)
    model = point_region(detector, trunk_dim=channels)
    model.feature = model.backbone.feature = feature
    return model


def point_region(
    detector: DictConfig, trunk_dim: int = 2048, hidden_dim: int = 2048, dim: int = 128
) -> DictConfig:
    """Point-level region contrast on the last map of an FPN detector's trunk.

    Args:
        detector: ``model`` of a config in ``configs/detection``.
        trunk_dim: channels of that map.
        hidden_dim: hidden channels of both heads.
        dim: dimension of a point's embedding; its affinity vector is twice as long.
    """
    backbone = L(Trunk)(bottom_up=detector.backbone.bottom_up, feature="res5")
    return _around(detector, trunk_dim, hidden_dim, dim, backbone=backbone, feature="res5")


def point_region_fpn(
    detector: DictConfig, feature: str = "p4", hidden_dim: int = 2048, dim: int = 128
) -> DictConfig:
    """The same on one level of the detector's FPN, which is pre-trained down to that level."""
    channels = detector.backbone.out_channels
    backbone = detector.backbone
    return _around(detector, channels, hidden_dim, dim, backbone=backbone, feature=feature)


def point_region_c4(detector: DictConfig, hidden_dim: int = 2048, dim: int = 128) -> DictConfig:
    """The same on a C4 detector's backbone, with its res5 applied to the complete map."""
    return _around(
        detector,
        detector.roi_heads.res5.out_channels,
        hidden_dim,
        dim,
        backbone=detector.backbone,
        feature="res4",
        res5=detector.roi_heads.res5,
    )


def _around(
    detector: DictConfig, input_dim: int, hidden_dim: int, dim: int, **networks: Any
) -> DictConfig:
    return L(PointRegionContrast)(
        **networks,
        head=L(MLPHead)(input_dim=input_dim, hidden_dim=hidden_dim, output_dim=dim, norm=""),
        affinity_head=L(AffinityHead)(
            input_dim=input_dim,
            hidden_dim=hidden_dim,
            output_dim=2 * dim,
            norm="SyncBN",
            prototypes=0,
        ),
        queue=L(KeyQueue)(length=65_536, dim=dim),
        contrast=L(PointContrast)(
            temperature=0.2,
            in_image=True,
            others="local",
            pool=1,
            log="outside",
            same_view=False,
            # The queue's keys for others="queue".
            queue_length=65_536,
            dim=dim,
        ),
        distillation=L(AffinityDistillation)(
            cells="${dataloader.train.dataset.views.cells}",
            student_temperature=0.1,
            teacher_temperature=(0.04, 0.07),
            warmup=0.3,
            prototypes="${model.affinity_head.prototypes}",
            center_momentum=0.9,
        ),
        momentum=L(ConstantParamScheduler)(value=0.999),
        temperature=0.2,
        image_weight=0.7,
        point_weight=0.3,
        affinity_weight=0.3,
        zero_init=True,
        # True: shuffling BN, i.e. per-GPU batch norm. False: the detector's SyncBN.
        shuffle=True,
        seed="${train.seed}",
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format=detector.input_format,
    )
