"""SoCo's views: the whole image, and crops that show some of its regions again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from region_pretrain.data.geometry import (
    ViewGeometry,
    boxes_in_view,
    overlaps,
    random_resized_crop,
    whole_image,
)
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.errors import UserError

_ATTEMPTS = 5  # crops are drawn again when they show too few regions


def pair_groups(sources: Sequence[str | int]) -> list[int]:
    """Which group of the first view's boxes belongs to each further view.

    Each view with a crop of its own has its own draw of regions, and the first view carries one
    group of K boxes for each such draw. A view that shows another view's crop shares its group.

    Args:
        sources: see :class:`SoCoViews`.

    Returns:
        One group index for each source.

    Raises:
        UserError: a source that is neither.
    """
    groups: list[int] = []
    for source in sources:
        if source != "crop" and source not in range(len(groups)):
            raise UserError(
                f"views.sources={list(sources)}: {source!r} is neither 'crop' nor the number of an "
                "earlier view after the first (0, 1, ...)"
            )
        groups.append(max(groups, default=-1) + 1 if source == "crop" else groups[source])
    return groups


def jitter_boxes(boxes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Shift and scale boxes by shares of their own size (released code; the paper moves centres).

    Args:
        boxes: ``(N, 4)`` XYXY, half-open.
        draws: ``(N, 4)``: left edge, top edge, width, height, as shares.

    Returns:
        ``(N, 4)`` float32, not clipped.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    start = boxes[:, :2] + draws[:, :2] * size
    jittered = np.empty(boxes.shape, np.float32)
    jittered[:, :2] = start
    jittered[:, 2:] = start + size * (1 + draws[:, 2:])
    return jittered


class SoCoViews(ViewSampler):
    """Draws the views of one image and K regions for each pair (first view, other view).

    The first view is the whole image, stretched. Its box slots are ``G * K``: one group of K for
    each other view with a crop of its own (:func:`pair_groups`). Each further view has K slots.
    All slots are valid: with fewer regions than K, random ones of them stand twice.

    Args:
        sizes: side of each view in pixels, the first view's first.
        sources: what each further view shows: ``"crop"`` a random crop of its own; an integer
            ``j`` the same crop and regions as further view ``j``, at another resolution.
        first_photometry, other_photometry: of the first view, and of all others.
        num_regions: K.
        crop_area: range of a crop's share of the image.
        jitter_prob, jitter_ratio: box jitter of the first view's copies.
        min_box_side: regions smaller than this after cropping, in pixels of the cropped view,
            count as lost. 0 keeps slivers, as released.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        sources: Sequence[str | int],
        first_photometry: Photometry,
        other_photometry: Photometry,
        num_regions: int = 4,
        crop_area: tuple[float, float] = (0.5, 1.0),
        jitter_prob: float = 0.5,
        jitter_ratio: float = 0.1,
        min_box_side: float = 0.0,
    ) -> None:
        if len(sizes) != len(sources) + 1:
            raise UserError(
                f"views.sizes={list(sizes)} gives one size a view, views.sources={list(sources)} "
                "one source a view after the first: their lengths do not fit"
            )
        self.sizes = [(size, size) for size in sizes]
        self.sources = list(sources)
        self.groups = pair_groups(self.sources)
        self.photometry = [first_photometry] + [other_photometry] * len(self.sources)
        self.num_regions = num_regions
        self.crop_area = tuple(crop_area)
        self.jitter_prob, self.jitter_ratio = jitter_prob, jitter_ratio
        self.min_box_side = min_box_side

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """See :class:`~region_pretrain.data.views.ViewSampler`."""
        if not len(boxes):
            boxes = np.array([[0, 0, width, height]], np.float32)
        first = whole_image(width, height, self.sizes[0], rng)
        others, candidates = self._draw_crops(width, height, boxes, rng)

        first_boxes, first_ids = [], []
        other_boxes: list[np.ndarray] = []
        other_ids: list[np.ndarray] = []
        for j, (geometry, source) in enumerate(zip(others, self.sources, strict=True)):
            if source == "crop":
                chosen = candidates[j]
                if len(chosen) > self.num_regions:
                    chosen = rng.permutation(chosen)[: self.num_regions]
                if len(chosen):
                    mine = self._jitter(boxes.take(chosen, axis=0), rng)
                else:  # nothing of any region in the crop: the views match as wholes
                    mine = np.array([[0, 0, width, height]], np.float32)
                slots = self._pad(len(mine), rng)
                first_boxes.append(mine[slots])
                first_ids.append(chosen[slots] if len(chosen) else np.zeros_like(slots))
            else:
                chosen = candidates[source]
            if len(chosen):
                seen = boxes_in_view(geometry, boxes.take(chosen, axis=0))
            else:
                seen = np.array([[0, 0, *geometry.size[::-1]]], np.float32)
            slots = self._pad(len(seen), rng)
            other_boxes.append(seen[slots])
            other_ids.append(chosen[slots] if len(chosen) else np.zeros_like(slots))
            candidates[j] = chosen  # a view of the same crop shows the same regions

        # One whole image, so what is jittered out of it is clipped by the view.
        in_first = boxes_in_view(first, np.concatenate(first_boxes))
        samples = []
        for geometry, photometry, view_boxes, ids in zip(
            [first, *others],
            self.photometry,
            [in_first, *other_boxes],
            [np.concatenate(first_ids), *other_ids],
            strict=True,
        ):
            ids = ids.astype(np.int64, copy=False)
            samples.append(
                ViewSample(geometry, photometry, view_boxes, ids, np.ones(len(ids), bool))
            )
        return samples

    def _draw_crops(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[ViewGeometry], list[np.ndarray]]:
        """Draw the further views until each shows enough regions, or give up.

        Enough is half of K, and half of that at each further attempt, but at least one (release).
        """
        wanted = max(self.num_regions // 2, 1)
        for _ in range(_ATTEMPTS):
            geometries: list[ViewGeometry] = []
            candidates: list[np.ndarray] = []
            for size, source in zip(self.sizes[1:], self.sources, strict=True):
                geometry = random_resized_crop(width, height, size, rng, self.crop_area)
                if source != "crop":
                    at = geometries[source]
                    geometry = ViewGeometry(
                        at.left, at.top, at.width, at.height, size, geometry.flip
                    )
                geometries.append(geometry)
                candidates.append(self._visible(geometry, boxes))
            own = [c for c, s in zip(candidates, self.sources, strict=True) if s == "crop"]
            if all(len(c) >= wanted for c in own):
                break
            wanted = max(wanted // 2, 1)
        return geometries, candidates

    def _visible(self, geometry: ViewGeometry, boxes: np.ndarray) -> np.ndarray:
        """Indices of the regions that a view shows."""
        shown = overlaps(geometry.crop_box, boxes)
        if self.min_box_side > 0:
            inside = boxes_in_view(geometry, boxes)
            shown &= (inside[:, 2:] - inside[:, :2]).min(axis=1) >= self.min_box_side
        return np.flatnonzero(shown)

    def _jitter(self, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        draws = rng.uniform(-self.jitter_ratio, self.jitter_ratio, boxes.shape)
        draws[rng.random(len(boxes)) >= self.jitter_prob] = 0
        return jitter_boxes(boxes, draws)

    def _pad(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Slot indices: each region once, then random ones of them again up to K."""
        if count == self.num_regions:
            return np.arange(count)
        again = rng.integers(count, size=self.num_regions - count)
        return np.concatenate([np.arange(count), again])
