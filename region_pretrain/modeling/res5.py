"""The per-region ``res5`` stage of a C4 detector, followed by a norm."""

from __future__ import annotations

from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling.backbone import ResNet
from torch import nn

from region_pretrain.errors import UserError


def res5_stage_with_norm(*, out_channels: int, norm: str, **stage: Any) -> nn.Sequential:
    """Build a ResNet stage followed by a norm, for ``Res5ROIHeads(res5=...)``.

    In MoCo (appendix on PASCAL VOC) the box head is the res5 stage "followed by a BN layer". Names
    are those of MoCo's own detector, ``roi_heads.res5.{0,1,2}.*`` and ``roi_heads.res5.norm.*``, so
    a plain res5 provides all weights but the norm's.

    Args:
        out_channels: channels of every block and of the norm.
        norm: a name for ``detectron2.layers.get_norm``, used in the blocks and after them.
        stage: the other arguments of ``detectron2.modeling.backbone.ResNet.make_stage``.

    Returns:
        A module from (R, in_channels, H, W) to (R, out_channels, H/stride, W/stride).

    Raises:
        UserError: ``norm`` is empty.
    """
    last = get_norm(norm, out_channels)
    if last is None:
        raise UserError(f"res5_stage_with_norm needs a norm such as 'SyncBN', got norm={norm!r}")
    blocks = ResNet.make_stage(out_channels=out_channels, norm=norm, **stage)
    res5 = nn.Sequential(*blocks)
    res5.add_module("norm", last)
    return res5
