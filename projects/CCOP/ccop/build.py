"""CCOP around a detector."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.projects.ccop.curriculum import Curriculum
from region_pretrain.projects.ccop.meta_arch import CCOP


def ccop(
    detector: DictConfig | CfgNode | nn.Module,
    *,
    hidden_dim: int = 2048,
    dim: int = 128,
    size: int = 224,
) -> DictConfig | CCOP:
    """CCOP on the trunk and the feature pyramid of a detector.

    Regions are pooled by the detector's box pooler, or by a new one for a one-stage detector.

    Args:
        detector: see :class:`~region_pretrain.modeling.detector.Detector`.
        hidden_dim, dim: hidden and output channels of the two heads.
        size: side length of the views in pixels, which bounds the scale of regions.

    Returns:
        The lazy ``model`` of a pre-training config; for a built detector a model that shares its
        modules.

    Raises:
        UserError: the detector has no feature pyramid.
    """
    parts = Detector(detector)
    if not parts.levels:
        raise UserError(
            "the detector has no feature pyramid, which CCOP trains: use soco, point_region, moco "
            "or byol"
        )
    trunk_feature, trunk_dim = parts.trunk_map
    channels, height, width = parts.pooled_shape
    head = dict(hidden_dim=hidden_dim, output_dim=dim, norm="", dropout=0.1, init_std=0.01)
    return parts.finish(
        L(CCOP)(
            backbone=parts.backbone,
            trunk_feature=trunk_feature,
            in_features=parts.region_maps,
            pooler=parts.pooler,
            image_head=L(MLPHead)(input_dim=trunk_dim, **head),
            region_head=L(MLPHead)(input_dim=channels * height * width, **head),
            image_queue=L(KeyQueue)(length=65_536, dim=dim),
            region_queue=L(KeyQueue)(length=65_536, dim=dim),
            # (at the start of training, at the end). For the closed loop:
            # curriculum.feedback=L(Feedback)(set_point=0.8, gain=0.1, period=10)
            curriculum=L(Curriculum)(
                center=(0.15, 0.6), log_size=(0.35, 1.4), iou_floor=(0.8, 0.4), feedback=None
            ),
            momentum=L(ConstantParamScheduler)(value=0.999),
            temperature=0.2,
            image_weight=1.0,
            inter_weight=1.0,
            intra_weight=1.0,
            margin=0.4,
            max_pair_iou=0.05,
            anchor="column",
            num_candidates=10,
            hardest=True,
            level_scales=parts.level_scales(size),
            # True: shuffling BN, i.e. batch norm over norm_batch_size images (null: of a process).
            # False: the detector's SyncBN.
            shuffle=True,
            norm_batch_size=32,
            seed=parts.refer("train.seed", 0),
            **parts.pixels,
        )
    )
