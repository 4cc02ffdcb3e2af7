"""Overlap of two crops, and their cells that show the same place."""

from __future__ import annotations

import numpy as np

from region_pretrain.data.geometry import ViewGeometry


def crop_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of two crops divided by the area of the larger.

    Args:
        a, b: ``(4,)`` XYXY.

    Returns:
        A fraction in [0, 1].
    """
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    larger = max(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
    return float(np.prod(np.maximum(sides, 0)) / larger)


def view_window(geometry: ViewGeometry) -> tuple[float, float, float, float]:
    """Positions of a view's left, top, right and bottom edges in the original image, in pixels.

    In a flipped view the left edge is to the right of the right edge.
    """
    left, top, right, bottom = geometry.crop_box.tolist()
    return (right, top, left, bottom) if geometry.flip else (left, top, right, bottom)


def match_cells(
    first: tuple[float, float, float, float],
    second: tuple[float, float, float, float],
    cells: int,
) -> np.ndarray:
    """Pairs of cells of two views whose centres are close to each other in the image.

    Their distance is less than half the larger of the two cells' diagonals.

    Args:
        first, second: :func:`view_window` of each view, in the same units.
        cells: number of cells per side, in both views.

    Returns:
        ``(M, 2)`` int64, row-major indices of a cell in the first view and one in the second. A
        cell may occur in several pairs.
    """
    # Crops are axis-aligned, so columns and rows are paired separately first. Of 3136 x 3136 pairs
    # a few thousand remain to be checked.
    gaps, diagonals = [], []
    for axis in (0, 1):
        steps = [(window[axis + 2] - window[axis]) / cells for window in (first, second)]
        centers = [
            window[axis] + (np.arange(cells) + 0.5) * step
            for window, step in zip((first, second), steps, strict=True)
        ]
        gaps.append(np.abs(centers[0][:, None] - centers[1]))  # (cells, cells)
        diagonals.append(steps)
    radius = 0.5 * np.hypot(*np.array(diagonals)).max()
    columns, rows = (np.argwhere(gap < radius) for gap in gaps)
    squared = [
        gap[near[:, 0], near[:, 1]] ** 2 for gap, near in zip(gaps, (columns, rows), strict=True)
    ]
    row, column = np.nonzero(squared[0] + squared[1][:, None] < radius**2)
    return rows[row] * cells + columns[column]
