"""Recipes of boxes that another program computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from region_pretrain.errors import UserError
from region_pretrain.images import size_mismatch
from region_pretrain.regions.elsewhere.json_boxes import read_masks
from region_pretrain.regions.elsewhere.label_maps import read_label_map
from region_pretrain.regions.elsewhere.matching import GIVEN, Given
from region_pretrain.regions.filters import canonical, ordered_nms
from region_pretrain.regions.recipes import Found, Recipe, SizeRules

_CLIPPED_PIXELS = 1.0


@dataclass(frozen=True)
class GivenRecipe(SizeRules):
    """Filters the boxes of a record, best first; without scores in random order.

    Attributes:
        source: digest of what computed the boxes.
        min_side, max_aspect, min_size_ratio, max_size_ratio: see
            :class:`~region_pretrain.regions.recipes.SizeRules`; ``max_aspect=0`` is no limit.
        min_score: smallest score; 0 is no limit.
        nms_iou: a box is removed if its IoU with a better one is above this.
        top: number of boxes kept, the best ones; 0 is no limit.
    """

    source: str = ""
    min_side: float = 0.0
    max_aspect: float = 0.0
    min_size_ratio: float = 0.0
    max_size_ratio: float = 1.0
    min_score: float = 0.0
    nms_iou: float = 1.0
    top: int = 0

    @property
    def standard(self) -> Recipe:
        return type(self)(self.name)

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        return self.run(image, record, rng).boxes

    def run(self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator) -> Found:
        given = self.given(record)
        height, width = image.shape[:2]
        if given is None:
            return Found(np.zeros((0, 4), np.float32), 0)
        if given.size not in (None, (width, height)):
            name = f"{record['file_name']} (boxes of {given.source})"
            raise size_mismatch(name, (width, height), given.size)
        return self.select(given, width, height, rng)

    def given(self, record: Mapping[str, Any]) -> Given | None:
        """The boxes of a record; None if it has none."""
        return record.get(GIVEN)

    def select(self, given: Given, width: int, height: int, rng: np.random.Generator) -> Found:
        """Clip, filter and order the boxes of an image."""
        boxes, scores = given.boxes, given.scores
        if scores is None and self.min_score:
            raise UserError(f"{given.source} has no scores: leave out min_score")
        finite = np.isfinite(boxes).all(axis=1)
        if scores is not None:
            finite &= np.isfinite(scores)
        boxes, count = boxes[finite], len(boxes)
        edges = np.array((width, height) * 2, np.float32)
        clip = np.clip(boxes, 0, edges)
        full = (clip[:, :2] < clip[:, 2:]).all(axis=1)
        boxes, clip = boxes[full], clip[full]
        clipped = int((np.abs(boxes - clip) > _CLIPPED_PIXELS).any(axis=1).sum())
        dropped, boxes = count - len(clip), clip

        keep = self.passing(boxes, width, height)[0]
        if scores is None:
            boxes = canonical(boxes[keep])
            boxes = boxes[rng.permutation(len(boxes))]
        else:
            scores = scores[finite][full]
            if self.min_score:
                keep &= scores >= self.min_score
            boxes, scores = boxes[keep], scores[keep]
            boxes = boxes[np.lexsort([*boxes.T, -scores])]  # equal scores: by coordinates
            _, first = np.unique(boxes, axis=0, return_index=True)
            boxes = boxes[np.sort(first)]
        if self.nms_iou < 1:
            boxes = ordered_nms(boxes, self.nms_iou)
        return Found(boxes[: self.top or None], count, dropped, clipped)


@dataclass(frozen=True)
class FileRecipe(GivenRecipe):
    """The boxes of a file, or of a folder with one file per image; see :class:`GivenRecipe`.

    Attributes:
        with_zero: 1 if label 0 of label maps is a region, not background.
    """

    with_zero: int = 0

    def given(self, record: Mapping[str, Any]) -> Given | None:
        given = record.get(GIVEN)
        if not isinstance(given, str):
            return given
        zero = bool(self.with_zero)
        is_map = given.lower().endswith(".png")
        table = read_label_map(given, zero) if is_map else read_masks(given)
        return Given(table.boxes, table.scores, table.sizes.get(""), given)


@dataclass(frozen=True)
class DetectorRecipe(GivenRecipe):
    """The boxes of a detector, without their classes; see :class:`GivenRecipe`.

    The detector itself suppresses boxes only within a level or a class.

    Attributes:
        detections: 1 for the final detections, 0 for the proposals of the first stage.
    """

    nms_iou: float = 0.7
    top: int = 100
    detections: int = 0


@dataclass(frozen=True)
class FeaturesRecipe(GivenRecipe):
    """Boxes of clusters of a network's features; see :class:`GivenRecipe`.

    They have no scores, so the suppression is in random order.

    Attributes:
        clusters: numbers of clusters; the boxes are those of all clusterings.
        stride: the map with the largest stride up to this is clustered, in pixels of the network's
            input; if there is none, the finest map.
        side: larger images are downscaled to an area of ``side * side`` pixels.
    """

    max_aspect: float = 3.0
    min_size_ratio: float = 0.1
    max_size_ratio: float = 0.8
    nms_iou: float = 0.7
    top: int = 100
    clusters: tuple[int, ...] = (2, 4, 8)
    stride: int = 8
    side: int = 224

    def check(self) -> None:
        super().check()
        if not self.clusters or not 2 <= min(self.clusters) <= max(self.clusters) <= 255:
            self._refuse("clusters", "must be whole numbers from 2 to 255, as in 2-4-8")
        if self.side < 32:
            self._refuse("side", "must be at least 32")
        if self.min_score:
            self._refuse("min_score", "these boxes have no scores")
