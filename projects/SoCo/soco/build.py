"""SoCo around a detector."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from omegaconf import DictConfig
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.projects.soco.meta_arch import SoCo
from region_pretrain.solver import cosine_momentum


def soco(
    detector: DictConfig | CfgNode | nn.Module,
    *,
    hidden_dim: int = 4096,
    dim: int = 256,
    size: int = 224,
) -> DictConfig | SoCo:
    """SoCo on all of a detector that comes before its predictors.

    That is its backbone and its box head, ``res5`` of a C4 detector, one box head for all stages of
    a Cascade R-CNN, or the towers of RetinaNet or FCOS.

    Args:
        detector: see :class:`~region_pretrain.modeling.detector.Detector`.
        hidden_dim, dim: hidden and output channels of projector and predictor.
        size: side length of the views in pixels, which bounds the scale of regions.

    Returns:
        The lazy ``model`` of a pre-training config; for a built detector a model that shares its
        modules, for the views of :class:`~region_pretrain.projects.soco.SoCoViews` with
        ``sources=["crop"]``.

    Raises:
        UserError: the detector has nothing that is applied to regions.
    """
    parts = Detector(detector)
    head = parts.head
    if head is None:
        raise UserError(
            "the detector has neither a box head nor towers, which SoCo trains: use moco, byol, "
            "point_region or ccop"
        )
    return parts.finish(
        L(SoCo)(
            backbone=parts.backbone,
            projector=L(MLPHead)(input_dim=head.channels, hidden_dim=hidden_dim, output_dim=dim),
            predictor=L(MLPHead)(input_dim=dim, hidden_dim=hidden_dim, output_dim=dim),
            momentum=L(cosine_momentum)(start=0.99),
            in_features=parts.region_maps,
            pooler=parts.pooler,
            head=head.part,
            head_name=head.name,
            level_scales=parts.level_scales(size),
            sources=parts.refer("dataloader.train.dataset.views.sources", ["crop"]),
            # True: head on all levels: the released code's batch-norm statistics, 4 times the work.
            all_levels=False,
            zero_init=True,
            **parts.pixels,
        )
    )
