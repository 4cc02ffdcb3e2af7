"""Pyramid levels from a single map, for pre-training a backbone without an FPN."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn import weight_init
from torch import Tensor, nn


class PseudoLevels(nn.Module):
    """P5 is C5 with fewer channels; P4, P3 and P2 are P5 upsampled 2, 4 and 8 times (nearest).

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of each level.
        in_feature: name of the last map.
        stride: stride of the last map in pixels.
        norm: name of a norm, see :func:`detectron2.layers.get_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        in_feature: str = "res5",
        stride: int = 32,
        norm: str = "SyncBN",
    ) -> None:
        super().__init__()
        self.reduce = Conv2d(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=not norm,
            norm=get_norm(norm, out_channels),
            activation=nn.ReLU(),
        )
        weight_init.c2_msra_fill(self.reduce)
        self.in_feature = in_feature
        self.scales = {"p2": 8, "p3": 4, "p4": 2, "p5": 1}
        self.out_channels, self.stride = out_channels, stride

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level, like a backbone's ``output_shape``."""
        return {
            name: ShapeSpec(channels=self.out_channels, stride=self.stride // scale)
            for name, scale in self.scales.items()
        }

    def forward(self, maps: Mapping[str, Tensor], reads: Mapping[str, slice]) -> dict[str, Tensor]:
        """Compute the map ``(n, C, H, W)`` of each level in ``reads`` for the given images."""
        coarse = self.reduce(maps[self.in_feature])
        return {
            name: F.interpolate(coarse[span], scale_factor=self.scales[name], mode="nearest")
            for name, span in reads.items()
        }
