"""Time, recall and precision of recipes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from region_pretrain.errors import UserError
from region_pretrain.images import read_record
from region_pretrain.regions.recipes import Recipe
from region_pretrain.regions.sources import ground_truth_boxes
from region_pretrain.regions.store import key_hash
from region_pretrain.regions.summary import RECALL_IOUS, Hits, count_hits
from region_pretrain.system import one_opencv_thread


@dataclass
class RecipeCost:
    """Cost, recall and precision of one recipe.

    Attributes:
        recipe: the recipe's id.
        seconds: mean time per image on one core, without reading the file.
        boxes: mean number of boxes per image.
        recall: IoU threshold -> percentage of the annotated objects that some box covers.
        precision: percentage of the boxes that cover an object, see
            :data:`~region_pretrain.regions.summary.PRECISION_IOU`; NaN without boxes.
    """

    recipe: str
    seconds: float
    boxes: float
    recall: dict[float, float]
    precision: float


def compare_recipes(
    records: Sequence[Mapping[str, Any]], recipes: Sequence[Recipe]
) -> list[RecipeCost]:
    """Run recipes in turn on the same annotated images, on one core.

    Args:
        records: Detectron2 dicts with ``annotations``.
        recipes: the recipes to compare.

    Returns:
        One entry per recipe, in order.

    Raises:
        UserError: no image has an object.
    """
    seconds = np.zeros(len(recipes))
    boxes_found = np.zeros(len(recipes))
    hits = [Hits() for _ in recipes]
    with one_opencv_thread():
        for record in tqdm(records, desc="recipes", unit="img"):
            image = read_record(record)
            objects = ground_truth_boxes(record, image.shape[1], image.shape[0])
            for r, recipe in enumerate(recipes):
                rng = np.random.default_rng([0, key_hash(str(record["image_id"]).encode())])
                started = time.perf_counter()
                boxes = recipe(image, record, rng)
                seconds[r] += time.perf_counter() - started
                boxes_found[r] += len(boxes)
                hits[r] += count_hits(boxes, objects)
    if not any(hit.objects for hit in hits):
        raise UserError("no image has an annotated object: recall needs ground truth")
    return [
        RecipeCost(
            recipe.id,
            seconds[r] / len(records),
            boxes_found[r] / len(records),
            {iou: 100 * recall for iou, recall in zip(RECALL_IOUS, hit.recall, strict=True)},
            100 * hit.precision,
        )
        for r, (recipe, hit) in enumerate(zip(recipes, hits, strict=True))
    ]
