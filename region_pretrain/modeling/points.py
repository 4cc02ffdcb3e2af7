"""Features at points of a view."""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear_weights(
    points: Tensor, view_size: tuple[int, int], map_size: tuple[int, int]
) -> Tensor:
    """How much each place of a feature map has in a point's feature.

    ``weights @ map`` is bilinear interpolation between the centres of the map's pixels, and beyond
    the outermost centres their value: ``F.grid_sample(align_corners=False, padding_mode="border")``
    as a matrix product, which has no atomic additions in its backward pass and whose affinities
    between points follow from those between the map's places.

    Args:
        points: ``(..., 2)`` x and y in view pixels, continuous: a pixel's centre is at a half.
        view_size: ``(height, width)`` of the view in pixels.
        map_size: ``(h, w)`` of the map that stands for the whole view.

    Returns:
        ``(..., h * w)`` of the points' dtype: rows that sum to 1, with up to 4 entries that are not
        0, in row-major order.
    """
    height, width = view_size
    h, w = map_size
    x = _hats(points[..., 0] * (w / width) - 0.5, w)  # (..., w)
    y = _hats(points[..., 1] * (h / height) - 0.5, h)  # (..., h)
    return (y[..., :, None] * x[..., None, :]).flatten(-2)


def _hats(position: Tensor, count: int) -> Tensor:
    places = torch.arange(count, device=position.device, dtype=position.dtype)
    return (1 - (position.clamp(0, count - 1)[..., None] - places).abs()).clamp(min=0)


def cell_centres(cells: int, view_size: tuple[int, int]) -> Tensor:
    """Centres of a view's cells.

    Args:
        cells: a side.
        view_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``(cells * cells, 2)`` float32 x and y in view pixels, row by row.
    """
    height, width = view_size
    steps = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)
