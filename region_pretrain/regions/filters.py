"""Which boxes stay. All boxes are ``(N, 4)`` XYXY in pixels, half-open."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.ops import nms


def canonical(boxes: np.ndarray) -> np.ndarray:
    """One copy of each box, by area and then by coordinates: an order that is every run's.

    Args:
        boxes: ``(N, 4)``.

    Returns:
        ``(M, 4)`` float32, M <= N.
    """
    boxes = np.unique(np.asarray(boxes, np.float32).reshape(-1, 4), axis=0)
    width, height = _sides(boxes)
    return boxes[np.argsort(width * height, kind="stable")]


def clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Cut boxes at the image's border and drop those of which nothing is left.

    Returns:
        ``(M, 4)`` float32.
    """
    boxes = np.clip(np.asarray(boxes, np.float32).reshape(-1, 4), 0, (width, height) * 2)
    return boxes[(boxes[:, :2] < boxes[:, 2:]).all(axis=1)].astype(np.float32)


def min_side(boxes: np.ndarray, side: float) -> np.ndarray:
    """``(N,)`` bool: neither side shorter than ``side`` pixels."""
    width, height = _sides(boxes)
    return (width >= side) & (height >= side)


def max_aspect(boxes: np.ndarray, aspect: float, strict: bool = False) -> np.ndarray:
    """``(N,)`` bool: the longer side at most (``strict``: less than) ``aspect`` times the other."""
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
    """Non-maximum suppression with random scores: which box of a cluster survives is chance.

    Args:
        boxes: ``(N, 4)``, in canonical order if the result is to depend on nothing but ``rng``.
        iou: a box goes if its IoU with a survivor is above it.
        max_boxes: so many survivors at most, a random choice.
        rng: where the scores come from.

    Returns:
        ``(M, 4)`` float32, in the order of the scores.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    order = rng.permutation(len(boxes))  # as an order of scores drawn from any continuous law
    boxes = boxes[order]
    scores = torch.arange(len(boxes), 0, -1, dtype=torch.float64)
    keep = nms(torch.from_numpy(boxes).double(), scores, iou)
    return boxes[keep[:max_boxes].numpy()]


def _sides(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height in float64: exact for whole pixels."""
    boxes = np.asarray(boxes, np.float64)
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
