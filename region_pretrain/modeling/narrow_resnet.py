"""A ResNet-18 of any width, for CPU runs."""

from __future__ import annotations

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet


def narrow_resnet18_stages(channels: int = 24, norm: str = "SyncBN") -> list[list[CNNBlockBase]]:
    """The four stages of a ResNet-18 whose first stage has ``channels`` channels instead of 64.

    Args:
        channels: channels of the stem and res2; res3 to res5 have 2, 4 and 8 times as many.
        norm: a name for :func:`detectron2.layers.get_norm`.

    Returns:
        ``stages`` for Detectron2's :class:`~detectron2.modeling.backbone.resnet.ResNet`.
    """
    widths = [channels, channels, 2 * channels, 4 * channels, 8 * channels]
    return [
        ResNet.make_stage(
            BasicBlock,
            2,
            stride_per_block=[1 if i == 0 else 2, 1],
            in_channels=widths[i],
            out_channels=widths[i + 1],
            norm=norm,
        )
        for i in range(4)
    ]
