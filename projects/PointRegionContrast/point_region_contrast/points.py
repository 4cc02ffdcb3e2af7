"""Features at points of a view."""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear_weights(
    points: Tensor, view_size: tuple[int, int], map_size: tuple[int, int]
) -> Tensor:
    """The weight of each location of a feature map in a point's feature.

    ``weights @ map`` interpolates bilinearly between the centres of the map's pixels, and extends
    the outermost values beyond them: ``F.grid_sample(align_corners=False, padding_mode="border")``
    as a matrix product. Its backward pass has no atomic additions, and affinities between points
    follow from those between the map's locations.

    Args:
        points: ``(..., 2)`` x and y in view pixels, continuous: a pixel's centre is at a half.
        view_size: ``(height, width)`` of the view in pixels.
        map_size: ``(h, w)`` of the map, which covers the view.

    Returns:
        ``(..., h * w)`` in the points' dtype, row-major: each row sums to 1 and has at most 4
        non-zero entries.
    """
    height, width = view_size
    h, w = map_size
    x = _hats(points[..., 0] * (w / width) - 0.5, w)  # (..., w)
    y = _hats(points[..., 1] * (h / height) - 0.5, h)  # (..., h)
    return (y[..., :, None] * x[..., None, :]).flatten(-2)


def _hats(position: Tensor, count: int) -> Tensor:
    centers = torch.arange(count, device=position.device, dtype=position.dtype)
    return (1 - (position.clamp(0, count - 1)[..., None] - centers).abs()).clamp(min=0)


def cell_centers(cells: int, view_size: tuple[int, int]) -> Tensor:
    """Centres of the cells of a grid over a view.

    Args:
        cells: number of cells per side.
        view_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``(cells * cells, 2)`` float32 x and y in view pixels, row by row.
    """
    height, width = view_size
    steps = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)
