"""CCOP's views: two independent crops, and the regions that enough is left of in both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from region_pretrain.data.geometry import (
    ViewGeometry,
    boxes_in_view,
    clip_boxes,
    random_resized_crop,
)
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.errors import UserError

_ATTEMPTS = 10  # crops are drawn again when no region survives in them


def surviving_share(geometry: ViewGeometry, boxes: np.ndarray) -> np.ndarray:
    """How much of each region's area a crop leaves.

    Args:
        geometry: the crop.
        boxes: ``(N, 4)`` XYXY in original pixels.

    Returns:
        ``(N,)`` float64 in [0, 1].
    """
    crop = geometry.crop_box.astype(np.float64)
    inside = np.clip(boxes.astype(np.float64), np.tile(crop[:2], 2), np.tile(crop[2:], 2))
    return _area(inside) / np.maximum(_area(boxes.astype(np.float64)), 1e-9)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


class CCOPViews(ViewSampler):
    """Draws a query view and a key view of one image, with the regions that live in both.

    Each view is a random resized crop of the whole image, drawn again up to ten times until a
    region survives in it: more than ``min_visible`` of its area is inside. A region is kept if it
    survives in both views and is larger than ``min_area`` in both. It has the same slot in both;
    slots without a region are not valid.

    Args:
        size: side of both views in pixels.
        photometry: of both views.
        num_regions: slots. Of more regions that are kept, so many are drawn.
        crop_areas: for each of the two views, range of the crop's share of the image. Which of the
            two is the query is drawn for each image.
        min_visible: share of a region's area that must lie inside a crop, exceeded.
        min_area: area in square pixels that a region must exceed in both views.

    Raises:
        UserError: a value that makes no sense.
    """

    def __init__(
        self,
        size: int,
        photometry: Photometry,
        num_regions: int = 50,
        crop_areas: Sequence[Sequence[float]] = ((0.1, 1.0), (0.1, 1.0)),
        min_visible: float = 0.6,
        min_area: float = 144.0,
    ) -> None:
        areas = [tuple(area) for area in crop_areas]
        if len(areas) != 2 or any(len(a) != 2 or not 0 < a[0] <= a[1] <= 1 for a in areas):
            raise UserError(
                f"views.crop_areas={areas}: one range within (0, 1] for each of the two views"
            )
        if not 0 <= min_visible < 1:
            raise UserError(f"views.min_visible={min_visible}: a share, at least 0 and below 1")
        if size < 2 or num_regions < 1 or min_area < 0:
            raise UserError(
                f"views.size={size}, num_regions={num_regions}, min_area={min_area}: at least 2, "
                "1 and 0"
            )
        self.size = (size, size)
        self.photometry = photometry
        self.num_regions = num_regions
        self.crop_areas = areas
        self.min_visible, self.min_area = min_visible, min_area

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """See :class:`~region_pretrain.data.views.ViewSampler`."""
        drawn = [self._draw_crop(width, height, boxes, area, rng) for area in self.crop_areas]
        if rng.random() < 0.5:
            drawn.reverse()
        geometries = [geometry for geometry, _ in drawn]
        kept, seen = self.match(geometries, boxes, drawn[0][1] & drawn[1][1])
        chosen = rng.permutation(len(kept))[: self.num_regions]
        chosen.sort()

        valid = np.arange(self.num_regions) < len(chosen)
        ids = np.zeros(self.num_regions, np.int64)
        ids[: len(chosen)] = kept[chosen]
        samples = []
        for geometry, view_boxes in zip(geometries, seen, strict=True):
            slots = np.zeros((self.num_regions, 4), np.float32)
            slots[: len(chosen)] = view_boxes[chosen]
            samples.append(ViewSample(geometry, self.photometry, slots, ids, valid))
        return samples

    def match(
        self, geometries: Sequence[ViewGeometry], boxes: np.ndarray, survives: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The regions that are kept, and where each view shows them.

        Args:
            geometries: of the two views.
            boxes: ``(N, 4)`` XYXY in original pixels.
            survives: ``(N,)`` bool: in both crops.

        Returns:
            ``(M,)`` int64 indices, and ``(M, 4)`` float32 XYXY for each view. The released code
            clamps coordinates to the last pixel's index: a box at the border ends at ``size - 1``.
        """
        seen = [boxes_in_view(geometry, boxes) for geometry in geometries]
        large = np.all([_area(b) > self.min_area for b in seen], axis=0)
        kept = np.flatnonzero(survives & large)
        last = self.size[1] - 1
        return kept, [clip_boxes(b[kept], last, last) for b in seen]

    def _draw_crop(
        self,
        width: int,
        height: int,
        boxes: np.ndarray,
        area: tuple[float, float],
        rng: np.random.Generator,
    ) -> tuple[ViewGeometry, np.ndarray]:
        """A crop and which regions survive in it; the last one where none ever does."""
        for _ in range(_ATTEMPTS):
            geometry = random_resized_crop(width, height, self.size, rng, area)
            survives = surviving_share(geometry, boxes) > self.min_visible
            if survives.any() or not len(boxes):
                break
        return geometry, survives
