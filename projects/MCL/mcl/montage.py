"""Montages: views are shrunk and tiled so that each fills one window of one pyramid level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from region_pretrain.errors import UserError

#: Ways to shrink a view to a tile.
SHRINKS = ("nearest", "area", "bilinear")


class Montage:
    """Assigns images to tiles and arranges the tiles into canvases.

    Level ``i`` has canvases of ``n x n`` tiles, ``n = ratios[i]``; a tile is a view at ``1 / n`` of
    its size, so a canvas is as large as a view. Tiles are numbered row by row, canvas by canvas:
    *slot* ``canvas * n * n + row * n + column``.

    Args:
        size: side length of views and canvases in pixels.
        ratios: tiles per side of each level's canvases, ascending: coarse levels first.
        images_per_canvas: a level has ``ceil(batch / images_per_canvas)`` canvases. At most
            ``n * n``, so that each image has a tile; with fewer, images are repeated.
        shrink: ``"nearest"`` keeps every n-th pixel, as released; ``"area"`` averages n x n pixels;
            ``"bilinear"`` is PyTorch's anti-aliased filter, a triangle of 2n pixels.

    Raises:
        UserError: a ratio does not divide the size, the lists' lengths differ, or the filter is
            unknown.
    """

    def __init__(
        self,
        size: int = 224,
        ratios: Sequence[int] = (1, 2, 4, 8),
        images_per_canvas: Sequence[int] = (1, 4, 16, 32),
        shrink: str = "nearest",
    ) -> None:
        ratios, images_per_canvas = list(ratios), list(images_per_canvas)
        if not ratios or ratios != sorted(set(ratios)) or ratios[0] < 1:
            raise UserError(f"montage.ratios={ratios} must be ascending integers from 1")
        for ratio in ratios:
            if size % ratio:
                raise UserError(
                    f"montage.ratios={ratios}: {ratio} does not divide montage.size={size}"
                )
        fits = zip(images_per_canvas, ratios, strict=False)
        if len(images_per_canvas) != len(ratios) or not all(1 <= m <= n * n for m, n in fits):
            raise UserError(
                f"montage.images_per_canvas={images_per_canvas} must have one entry per ratio "
                f"{ratios}, between 1 and the number of tiles per canvas, {[n * n for n in ratios]}"
            )
        if shrink not in SHRINKS:
            raise UserError(f"montage.shrink={shrink}: must be one of {', '.join(SHRINKS)}")
        self.size = size
        self.ratios = ratios
        self.images_per_canvas = images_per_canvas
        self.shrink = shrink

    def draw(self, batch: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Assign an image to each tile: a random permutation of the slots, modulo the batch size.

        All images occur equally often in a level; if the batch size does not divide the number of
        slots, their counts differ by at most one. Canvases of one tile show the images in order.

        Args:
            batch: number of images.
            generator: CPU generator; by default PyTorch's, whose state is part of checkpoints.

        Returns:
            For each level ``(slots,)`` int64 image indices on the CPU.
        """
        slots = []
        for ratio, images in zip(self.ratios, self.images_per_canvas, strict=True):
            count = -(-batch // images) * ratio * ratio
            order = torch.randperm(count, generator=generator) if ratio > 1 else torch.arange(count)
            slots.append(order % batch)
        return slots

    def counts(self, slots: Sequence[Tensor]) -> list[int]:
        """Number of canvases of each level."""
        return [len(s) // (n * n) for s, n in zip(slots, self.ratios, strict=True)]

    def canvases(self, views: Sequence[Tensor], slots: Sequence[Tensor]) -> Tensor:
        """Shrink the views and tile them.

        Args:
            views: for each level ``(B, C, size, size)``, on any device.
            slots: the result of :meth:`draw`, on the same device.

        Returns:
            ``(sum of counts, C, size, size)``, level after level.
        """
        levels = zip(views, slots, self.ratios, strict=True)
        return torch.cat([tile(shrink(v, n, self.shrink)[s], n) for v, s, n in levels])

    def tile_boxes(self, level: int) -> Tensor:
        """Boxes of a canvas's tiles, ``(n * n, 4)`` float32 XYXY in the order of their slots."""
        ratio = self.ratios[level]
        side = self.size // ratio
        row, column = torch.meshgrid(torch.arange(ratio), torch.arange(ratio), indexing="ij")
        corners = torch.stack([column, row, column + 1, row + 1], dim=-1)
        return (corners.reshape(-1, 4) * side).float()


def shrink(images: Tensor, ratio: int, how: str) -> Tensor:
    """Shrink images by an integer factor.

    Args:
        images: ``(B, C, H, W)``, sides divisible by ``ratio``; floating point unless "nearest".
        ratio: the factor, at least 1.
        how: one of :data:`SHRINKS`.

    Returns:
        ``(B, C, H / ratio, W / ratio)``.
    """
    if ratio == 1:
        return images
    if how == "nearest":
        return images[..., ::ratio, ::ratio]
    if how == "area":
        return F.avg_pool2d(images, ratio)
    size = (images.shape[-2] // ratio, images.shape[-1] // ratio)
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def tile(tiles: Tensor, ratio: int) -> Tensor:
    """Assemble tiles: ``(K * n * n, C, h, w)`` in slot order to ``(K, C, n * h, n * w)``."""
    _, channels, h, w = tiles.shape
    grid = tiles.reshape(-1, ratio, ratio, channels, h, w)  # (K, row, column, C, h, w)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, ratio * h, ratio * w)


def cut_windows(maps: Tensor, window: int) -> Tensor:
    """Cut feature maps into non-overlapping windows, the inverse of :func:`tile`.

    Args:
        maps: ``(K, C, r * window, c * window)``.
        window: side length in feature pixels.

    Returns:
        ``(K * r * c, C, window, window)``, row by row, map by map.
    """
    count, channels, height, width = maps.shape
    grid = maps.reshape(count, channels, height // window, window, width // window, window)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, window, window)
