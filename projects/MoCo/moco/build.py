"""MoCo v2 around a detector."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig
from torch import nn

from region_pretrain.modeling.detector import Detector
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.projects.moco.meta_arch import MoCo


def moco(
    detector: DictConfig | CfgNode | nn.Module, *, hidden_dim: int = 2048, dim: int = 128
) -> DictConfig | MoCo:
    """MoCo v2 on the trunk of a detector, with ``res5`` of a C4 detector.

    Args:
        detector: see :class:`~region_pretrain.modeling.detector.Detector`.
        hidden_dim, dim: hidden and output channels of the head.

    Returns:
        The lazy ``model`` of a pre-training config; for a built detector a model that shares its
        modules.
    """
    parts = Detector(detector)
    networks, channels = parts.image_networks()
    return parts.finish(
        L(MoCo)(
            **networks,
            head=L(MLPHead)(input_dim=channels, hidden_dim=hidden_dim, output_dim=dim, norm=""),
            queue=L(KeyQueue)(length=65_536, dim=dim),
            momentum=L(ConstantParamScheduler)(value=0.999),
            temperature=0.2,
            # True: shuffling BN, i.e. batch norm over norm_batch_size images (null: of a process).
            # False: the detector's SyncBN.
            shuffle=True,
            norm_batch_size=32,
            seed=parts.refer("train.seed", 0),
            **parts.pixels,
        )
    )
