"""What recipes cost, and what they find."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from region_pretrain.errors import UserError
from region_pretrain.images import read_image
from region_pretrain.regions.generate import count_found
from region_pretrain.regions.recipes import Recipe
from region_pretrain.regions.sources import ground_truth_boxes
from region_pretrain.regions.store import key_hash


@dataclass
class RecipeCost:
    """One recipe over all images.

    Attributes:
        recipe: its id.
        seconds: mean of an image on one core, without reading the file.
        boxes: mean number of an image.
        recall: IoU threshold -> percent of the labelled objects that some box covers.
    """

    recipe: str
    seconds: float
    boxes: float
    recall: dict[float, float]


def compare_recipes(
    records: Sequence[Mapping[str, Any]],
    recipes: Sequence[Recipe],
    ious: Sequence[float] = (0.5, 0.7),
) -> list[RecipeCost]:
    """Run recipes on the same labelled images, one core, image by image in turn.

    Args:
        records: Detectron2's dicts with ``annotations``.
        recipes: what to compare.
        ious: thresholds of the recall.

    Returns:
        One entry a recipe, in order.

    Raises:
        UserError: no image has an object.
    """
    seconds = np.zeros(len(recipes))
    boxes_found = np.zeros(len(recipes))
    hits = np.zeros((len(recipes), len(ious)))
    objects_seen = 0
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        for record in tqdm(records, desc="recipes", unit="img"):
            image = read_image(record["file_name"])
            objects = ground_truth_boxes(record, image.shape[1], image.shape[0])
            objects_seen += len(objects)
            for r, recipe in enumerate(recipes):
                rng = np.random.default_rng([0, key_hash(str(record["image_id"]).encode())])
                started = time.perf_counter()
                boxes = recipe(image, record, rng)
                seconds[r] += time.perf_counter() - started
                boxes_found[r] += len(boxes)
                hits[r] += [count_found(boxes, objects, iou) for iou in ious]
    finally:
        cv2.setNumThreads(threads)
    if not objects_seen:
        raise UserError("no image has a labelled object: recall needs ground truth")
    return [
        RecipeCost(
            recipe.id,
            seconds[r] / len(records),
            boxes_found[r] / len(records),
            {iou: 100 * hit / objects_seen for iou, hit in zip(ious, hits[r], strict=True)},
        )
        for r, recipe in enumerate(recipes)
    ]
