"""BYOL around a detector."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from omegaconf import DictConfig
from torch import nn

from region_pretrain.modeling.detector import Detector
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.projects.byol.meta_arch import BYOL
from region_pretrain.solver import cosine_momentum


def byol(
    detector: DictConfig | CfgNode | nn.Module, *, hidden_dim: int = 4096, dim: int = 256
) -> DictConfig | BYOL:
    """BYOL on the trunk of a detector, with ``res5`` of a C4 detector.

    The target's initial momentum, like learning rate and weight decay, depends on the length of the
    run: leaves set all three.

    Args:
        detector: see :class:`~region_pretrain.modeling.detector.Detector`.
        hidden_dim, dim: hidden and output channels of projector and predictor.

    Returns:
        The lazy ``model`` of a pre-training config; for a built detector a model that shares its
        modules.
    """
    parts = Detector(detector)
    networks, channels = parts.image_networks()
    return parts.finish(
        L(BYOL)(
            **networks,
            projector=L(MLPHead)(input_dim=channels, hidden_dim=hidden_dim, output_dim=dim),
            predictor=L(MLPHead)(input_dim=dim, hidden_dim=hidden_dim, output_dim=dim),
            momentum=L(cosine_momentum)(start=0.99),
            zero_init=True,
            **parts.pixels,
        )
    )
