"""Filters of boxes. All boxes are ``(N, 4)`` XYXY in pixels, half-open."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.ops import nms


def canonical(boxes: np.ndarray) -> np.ndarray:
    """Unique boxes sorted by area, then by coordinates: the same order in every run.

    Args:
        boxes: ``(N, 4)``.

    Returns:
        ``(M, 4)`` float32, M <= N.
    """
    boxes = np.unique(np.asarray(boxes, np.float32).reshape(-1, 4), axis=0)
    width, height = _sides(boxes)
    return boxes[np.argsort(width * height, kind="stable")]


def clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Clip boxes to the image and drop those that become empty.

    Returns:
        ``(M, 4)`` float32.
    """
    boxes = np.clip(np.asarray(boxes, np.float32).reshape(-1, 4), 0, (width, height) * 2)
    return boxes[(boxes[:, :2] < boxes[:, 2:]).all(axis=1)].astype(np.float32)


def min_side(boxes: np.ndarray, side: float) -> np.ndarray:
    """``(N,)`` bool: both sides are at least ``side`` pixels."""
    width, height = _sides(boxes)
    return (width >= side) & (height >= side)


def max_aspect(boxes: np.ndarray, aspect: float, strict: bool = False) -> np.ndarray:
    """``(N,)`` bool: longer side / shorter side is at most (``strict``: below) ``aspect``."""
    width, height = _sides(boxes)
    if strict:
        return (width < aspect * height) & (height < aspect * width)
    return (width <= aspect * height) & (height <= aspect * width)


def size_ratio(
    boxes: np.ndarray, low: float, high: float, image_width: int, image_height: int
) -> np.ndarray:
    """``(N,)`` bool: ``low <= sqrt(box area / image area) <= high``."""
    width, height = _sides(boxes)
    ratio = np.sqrt(width * height) / np.sqrt(float(image_width) * image_height)
    return (low <= ratio) & (ratio <= high)


def random_nms(
    boxes: np.ndarray, iou: float, max_boxes: int, rng: np.random.Generator
) -> np.ndarray:
    """Non-maximum suppression with random scores: a random box of each cluster survives.

    Args:
        boxes: ``(N, 4)``, in canonical order to make the result a function of the set and ``rng``.
        iou: a box is removed if its IoU with a survivor is above this.
        max_boxes: largest number of survivors, a random choice.
        rng: generator of the scores.

    Returns:
        ``(M, 4)`` float32, in the order of the scores.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    order = rng.permutation(len(boxes))  # the order of independent random scores
    return ordered_nms(boxes[order], iou)[:max_boxes]


def ordered_nms(boxes: np.ndarray, iou: float) -> np.ndarray:
    """Non-maximum suppression of boxes in the order of their scores, best first.

    Args:
        boxes: ``(N, 4)`` float32.
        iou: a box is removed if its IoU with a survivor is above this.

    Returns:
        ``(M, 4)`` float32, in the same order.
    """
    scores = torch.arange(len(boxes), 0, -1, dtype=torch.float64)
    keep = nms(torch.from_numpy(boxes).double(), scores, iou)
    return boxes[keep.numpy()]


def _sides(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height in float64: exact for whole pixels."""
    boxes = np.asarray(boxes, np.float64)
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
