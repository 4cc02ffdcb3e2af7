"""Which crops overlap enough, and which of their cells show the same place."""

from __future__ import annotations

import numpy as np

from region_pretrain.data.geometry import ViewGeometry


def crop_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of two crops over the area of the larger.

    Args:
        a, b: ``(4,)`` XYXY.

    Returns:
        In [0, 1].
    """
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    larger = max(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
    return float(np.prod(np.maximum(sides, 0)) / larger)


def view_window(geometry: ViewGeometry) -> tuple[float, float, float, float]:
    """Where a view's left, top, right and bottom edges are in the original image, in pixels.

    Of a mirrored view the left edge is further right than the right one.
    """
    left, top, right, bottom = geometry.crop_box.tolist()
    return (right, top, left, bottom) if geometry.flip else (left, top, right, bottom)


def match_cells(
    first: tuple[float, float, float, float],
    second: tuple[float, float, float, float],
    cells: int,
    max_distance: float = 0.5,
) -> np.ndarray:
    """Pairs of cells of two views whose centres are near each other in the image.

    Their distance is less than ``max_distance`` times the larger of the two cells' diagonals.

    Args:
        first, second: :func:`view_window` of each view, in the same units.
        cells: a side, in both views.
        max_distance: in diagonals.

    Returns:
        ``(M, 2)`` int64: row-major indices of a cell in the first view and one in the second. A
        cell may be in several pairs.
    """
    # Both views are cut parallel to the image's sides, so that columns and rows can be paired
    # apart: of 3136 x 3136 pairs a few thousand are left to look at.
    gaps, diagonals = [], []
    for axis in (0, 1):
        steps = [(window[axis + 2] - window[axis]) / cells for window in (first, second)]
        centres = [
            window[axis] + (np.arange(cells) + 0.5) * step
            for window, step in zip((first, second), steps, strict=True)
        ]
        gaps.append(np.abs(centres[0][:, None] - centres[1]))  # (cells, cells)
        diagonals.append(steps)
    radius = max_distance * np.hypot(*np.array(diagonals)).max()
    columns, rows = (np.argwhere(gap < radius) for gap in gaps)
    squared = [
        gap[near[:, 0], near[:, 1]] ** 2 for gap, near in zip(gaps, (columns, rows), strict=True)
    ]
    row, column = np.nonzero(squared[0] + squared[1][:, None] < radius**2)
    return rows[row] * cells + columns[column]
