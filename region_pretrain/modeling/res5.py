"""The per-region ``res5`` stage of a C4 detector with one more norm behind it."""

from __future__ import annotations

from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling.backbone import ResNet
from torch import nn

from region_pretrain.errors import UserError


def res5_stage_with_norm(*, out_channels: int, norm: str, **stage: Any) -> nn.Sequential:
    """Build a ResNet stage followed by a norm, for ``Res5ROIHeads(res5=...)``.

    MoCo (appendix on PASCAL VOC) has for box head the res5 stage "followed by a BN layer". The keys
    are those of MoCo's own detector: ``roi_heads.res5.{0,1,2}.*`` and ``roi_heads.res5.norm.*``,
    so weights of a plain res5 fill all but the new norm.

    Args:
        out_channels: channels of every block and of the norm.
        norm: as for ``detectron2.layers.get_norm``, used inside the blocks and behind them.
        stage: the other arguments of ``detectron2.modeling.backbone.ResNet.make_stage``.

    Returns:
        A module from (R, in_channels, H, W) to (R, out_channels, H/stride, W/stride).

    Raises:
        UserError: ``norm`` is empty, so there is nothing to add.
    """
    last = get_norm(norm, out_channels)
    if last is None:
        raise UserError(f"res5_stage_with_norm needs a norm such as 'SyncBN', got norm={norm!r}")
    blocks = ResNet.make_stage(out_channels=out_channels, norm=norm, **stage)
    res5 = nn.Sequential(*blocks)
    res5.add_module("norm", last)
    return res5
