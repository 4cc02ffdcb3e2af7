"""Sources of regions that do not depend on the pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from region_pretrain.errors import UserError
from region_pretrain.images import size_mismatch
from region_pretrain.regions.filters import canonical, clip


def grid_boxes(width: int, height: int, divisions: Sequence[int], overlap: float) -> np.ndarray:
    """Windows on regular grids.

    Args:
        width, height: size of the image in pixels.
        divisions: for each number n, windows of 1/n of the width and the height.
        overlap: fraction of a window that overlaps with its neighbour, in [0, 1).

    Returns:
        ``(N, 4)`` float32 XYXY; N is the sum of (ceil((n - 1) / (1 - overlap)) + 1) squared over
        the divisions, minus the windows that coincide on a small image.
    """
    boxes = []
    for n in divisions:
        steps = int(np.ceil((n - 1) / (1 - overlap) - 1e-9)) + 1
        starts = np.linspace(0, 1 - 1 / n, steps)
        y, x = np.meshgrid(starts, starts, indexing="ij")
        corners = np.stack([x, y, x + 1 / n, y + 1 / n], axis=-1).reshape(-1, 4)
        boxes.append(corners * ((width, height) * 2))
    return canonical(clip(np.rint(np.concatenate(boxes)), width, height))


def random_boxes(
    width: int,
    height: int,
    count: int,
    ratio: tuple[float, float],
    max_aspect: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Random boxes: size and aspect ratio log-uniform, position uniform within the image.

    Args:
        width, height: size of the image in pixels.
        count: number of samples; those wider or higher than the image are dropped.
        ratio: range of sqrt(box area / image area).
        max_aspect: largest ratio of the longer to the shorter side.
        rng: the image's generator.

    Returns:
        ``(N, 4)`` float32 XYXY in whole pixels, N <= count, in the order of sampling.
    """
    side = np.exp(rng.uniform(*np.log(ratio), count)) * np.sqrt(float(width) * height)
    stretch = np.exp(rng.uniform(-0.5, 0.5, count) * np.log(max_aspect))
    w, h = np.rint(side * stretch), np.rint(side / stretch)
    x, y = np.rint(rng.random(count) * (width - w)), np.rint(rng.random(count) * (height - h))
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    return np.stack([x, y, x + w, y + h], axis=1)[fits].astype(np.float32)


def ground_truth_boxes(record: Mapping[str, Any], width: int, height: int) -> np.ndarray:
    """The annotated boxes of an image, without crowds and empty boxes.

    Args:
        record: Detectron2 dataset dict with ``annotations``.
        width, height: size of the image file in pixels.

    Returns:
        ``(N, 4)`` float32 XYXY, within the image.

    Raises:
        UserError: the record has no annotations, one of them has no box, or they are for an image
            of another size.
    """
    name = record.get("file_name", record.get("image_id"))
    if "annotations" not in record:
        raise UserError(f"{name}: ground truth is needed, but the data set has no annotations")
    declared = (record.get("width", width), record.get("height", height))
    if declared != (width, height):
        raise size_mismatch(name, (width, height), declared)
    for key in ("bbox", "bbox_mode"):
        if any(key not in a for a in record["annotations"]):
            raise UserError(f"{name}: an annotation has no {key}")
    boxes = [
        BoxMode.convert(list(map(float, a["bbox"])), a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in record["annotations"]
        if not a.get("iscrowd", 0)
    ]
    return canonical(clip(np.array(boxes, np.float32).reshape(-1, 4), width, height))
