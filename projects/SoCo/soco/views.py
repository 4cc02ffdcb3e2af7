"""SoCo's views: the whole image, and crops that contain some of its regions."""

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
from region_pretrain.data.photometry import CutOut, Photometry
from region_pretrain.data.two_crops import checked_crop_area
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.errors import UserError

_ATTEMPTS = 5  # crops that show too few regions are redrawn


def pair_groups(sources: Sequence[str | int]) -> list[int]:
    """Find the group of the first view's boxes that corresponds to each further view.

    Regions are sampled separately for each independent crop, and the first view has one group of K
    boxes for each of them. Views that share a crop share its group.

    Args:
        sources: see :class:`SoCoViews`.

    Returns:
        One group index per source.

    Raises:
        UserError: a source is neither ``"crop"`` nor the index of an earlier source.
    """
    groups: list[int] = []
    for source in sources:
        if source != "crop" and source not in range(len(groups)):
            raise UserError(
                f"views.sources={list(sources)}: {source!r} must be 'crop' or the index of an "
                "earlier source (0, 1, ...)"
            )
        groups.append(max(groups, default=-1) + 1 if source == "crop" else groups[source])
    return groups


def jitter_boxes(boxes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Shift and scale boxes relative to their size (as released; the paper moves the centre).

    Args:
        boxes: ``(N, 4)`` XYXY, half-open.
        draws: ``(N, 4)``: changes of left edge, top edge, width and height, as fractions of the
            box's size.

    Returns:
        ``(N, 4)`` float32, not clipped.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    corner = boxes[:, :2] + draws[:, :2] * size
    jittered = np.empty(boxes.shape, np.float32)
    jittered[:, :2] = corner
    jittered[:, 2:] = corner + size * (1 + draws[:, 2:])
    return jittered


class SoCoViews(ViewSampler):
    """Draws the views of an image, and K regions for each pair (first view, further view).

    The first view is the whole image, resized without keeping its aspect ratio. It has ``G * K``
    box slots, a group of K for each independent crop (:func:`pair_groups`); each further view has
    K. All slots are valid: if there are fewer than K regions, random ones are repeated.

    Args:
        sizes: side length of each view in pixels, starting with the first view.
        sources: what each further view shows: ``"crop"`` an independent random crop; an integer
            ``j`` the crop and the regions of further view ``j``, at another resolution.
        first_photometry, other_photometry: photometric augmentation of the first and of all further
            views.
        num_regions: K.
        crop_area: range of a crop's area as a fraction of the image.
        jitter_prob, jitter_ratio: probability and strength of the box jitter in the first view.
        min_box_side: minimum side length of a region within a further view, in pixels of that view;
            smaller ones are not used. 0 keeps slivers, as released.
        cutout_prob, cutout_area: cut-out of the regions in the further views
            (:class:`~region_pretrain.data.photometry.CutOut`): probability per region, and range of
            the square's area as a fraction of the region. 0: none, as in the 400-epoch FPN recipes.
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
        cutout_prob: float = 0.0,
        cutout_area: tuple[float, float] = (0.1, 0.3),
    ) -> None:
        if len(sizes) != len(sources) + 1:
            raise UserError(
                f"views.sizes={list(sizes)} must have one entry more than "
                f"views.sources={list(sources)}, which leaves out the first view"
            )
        self.sizes = [(size, size) for size in sizes]
        self.sources = list(sources)
        self.groups = pair_groups(self.sources)
        self.photometry = [first_photometry] + [other_photometry] * len(self.sources)
        self.num_regions = num_regions
        self.crop_area = checked_crop_area(min(sizes), crop_area)
        self.jitter_prob, self.jitter_ratio = jitter_prob, jitter_ratio
        self.min_box_side = min_box_side
        if not 0 <= cutout_prob <= 1 or not 0 < cutout_area[0] <= cutout_area[1] <= 1:
            raise UserError(
                f"views.cutout_prob={cutout_prob} must be in [0, 1], and views.cutout_area="
                f"{list(cutout_area)} must be 0 < low <= high <= 1"
            )
        self.cutout_prob, self.cutout_area = cutout_prob, tuple(cutout_area)

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """See :class:`~region_pretrain.data.views.ViewSampler`."""
        if not len(boxes):
            boxes = np.array([[0, 0, width, height]], np.float32)
        first = whole_image(width, height, self.sizes[0], rng)
        others, candidates = self._draw_crops(width, height, boxes, rng)

        photometry: list[Photometry | CutOut] = [self.photometry[0]]
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
                else:  # no region in the crop: match the complete views
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
            photometry.append(self._cut_out(self.photometry[j + 1], seen))
            slots = self._pad(len(seen), rng)
            other_boxes.append(seen[slots])
            other_ids.append(chosen[slots] if len(chosen) else np.zeros_like(slots))
            candidates[j] = chosen  # for views that share this crop

        # The first view shows the whole image, so this also clips jittered boxes to the image.
        in_first = boxes_in_view(first, np.concatenate(first_boxes))
        samples = []
        for geometry, augmentation, view_boxes, ids in zip(
            [first, *others],
            photometry,
            [in_first, *other_boxes],
            [np.concatenate(first_ids), *other_ids],
            strict=True,
        ):
            ids = ids.astype(np.int64, copy=False)
            samples.append(
                ViewSample(geometry, augmentation, view_boxes, ids, np.ones(len(ids), bool))
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
                while source != "crop":  # regions large enough in all views of the crop
                    candidates[source] = np.intersect1d(candidates[source], candidates[-1])
                    source = self.sources[source]
            own = [c for c, s in zip(candidates, self.sources, strict=True) if s == "crop"]
            if all(len(c) >= wanted for c in own):
                break
            wanted = max(wanted // 2, 1)
        return geometries, candidates

    def _visible(self, geometry: ViewGeometry, boxes: np.ndarray) -> np.ndarray:
        """Indices of the regions visible in a view."""
        shown = overlaps(geometry.crop_box, boxes)
        if self.min_box_side > 0:
            inside = boxes_in_view(geometry, boxes)
            shown &= (inside[:, 2:] - inside[:, :2]).min(axis=1) >= self.min_box_side
        return np.flatnonzero(shown)

    def _jitter(self, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        draws = rng.uniform(-self.jitter_ratio, self.jitter_ratio, boxes.shape)
        draws[rng.random(len(boxes)) >= self.jitter_prob] = 0
        return jitter_boxes(boxes, draws)

    def _cut_out(self, photometry: Photometry, boxes: np.ndarray) -> Photometry | CutOut:
        if not self.cutout_prob:
            return photometry
        return CutOut(photometry, boxes, self.num_regions, self.cutout_prob, self.cutout_area)

    def _pad(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """K slot indices: each region once, then random repetitions."""
        if count == self.num_regions:
            return np.arange(count)
        again = rng.integers(count, size=self.num_regions - count)
        return np.concatenate([np.arange(count), again])
