"""CCOP's views: two independent crops, and the regions that are visible enough in both."""

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

_ATTEMPTS = 10  # a crop is redrawn up to this often until a region survives in it


def visible_fraction(geometry: ViewGeometry, boxes: np.ndarray) -> np.ndarray:
    """The fraction of each region's area that is inside a crop.

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
    """Draws a query view and a key view of one image, with the regions that survive in both.

    Each view is a random resized crop of the image, drawn up to ten times until a region survives
    in it, i.e. more than ``min_visible`` of its area is inside. Regions that survive in both views
    and are larger than ``min_area`` in both are kept. A region has the same slot in both views;
    empty slots are not valid.

    Args:
        size: side length of both views in pixels.
        photometry: photometric augmentation of both views.
        num_regions: number of slots. If more regions are kept, a random subset is used.
        crop_areas: range of the crop's fraction of the image, for each of the two crops. Which crop
            is the query is random.
        min_visible: fraction of its area that a region needs inside a crop, exclusive.
        min_area: area in square view pixels that a region needs in both views, exclusive.

    Raises:
        UserError: a value is out of range.
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
            raise UserError(f"views.crop_areas={areas} must be one range within (0, 1] per view")
        if not 0 <= min_visible < 1:
            raise UserError(f"views.min_visible={min_visible} must be in [0, 1)")
        if size < 2 or num_regions < 1 or min_area < 0:
            raise UserError(
                f"views.size={size}, num_regions={num_regions} and min_area={min_area} must be at "
                "least 2, 1 and 0"
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
        """Find the regions that are kept, and their boxes in each view.

        Args:
            geometries: geometries of the two views.
            boxes: ``(N, 4)`` XYXY in original pixels.
            survives: ``(N,)`` bool, survives in both crops.

        Returns:
            ``(M,)`` int64 indices, and ``(M, 4)`` float32 XYXY for each view. The released code
            clamps coordinates to the last pixel's index, so boxes end at ``size - 1`` at most.
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
        """A crop, and which regions survive in it; the last crop drawn if none ever does."""
        for _ in range(_ATTEMPTS):
            geometry = random_resized_crop(width, height, self.size, rng, area)
            survives = visible_fraction(geometry, boxes) > self.min_visible
            if survives.any() or not len(boxes):
                break
        return geometry, survives
