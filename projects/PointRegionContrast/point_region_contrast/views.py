"""The views of point-level region contrast, and the points in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.geometry import ViewGeometry, map_points, random_resized_crop
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.two_crops import checked_crop_area
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.errors import UserError
from region_pretrain.projects.point_region_contrast.correspondence import (
    crop_overlap,
    match_cells,
    view_window,
)
from region_pretrain.projects.point_region_contrast.maps import (
    NO_REGION,
    BoxMaps,
    MapSource,
    RegionMap,
)
from region_pretrain.projects.point_region_contrast.pictures import draw_views

POSITIVES = ("region", "location")
#: First id of the places that query view and partner share, above the labels of all regions.
PLACE_IDS = 1 << 20


class PointRegionViews(ViewSampler):
    """Draws a query view, a key view and, for the affinities, a partner of the query view.

    The partner is a second crop that overlaps the query's: both are redrawn until their
    intersection is at least ``min_overlap`` of the larger. The key view is independent.

    A point is a box without extent, so it passes through the code for boxes. The first
    ``num_regions * points`` slots of query and key view are points of the regions visible in both
    views, with the points of a region next to each other; slots with the same id are positives.
    Points are centres of a view's cells, drawn uniformly with replacement from the cells of their
    region. The last ``pairs`` slots of the query, and all slots of the partner, are places visible
    in both, one id per place.

    Args:
        size: side length of all views in pixels.
        photometry: photometric augmentation of all views.
        maps: source of the region maps.
        num_regions: number of regions; if both views see more, a random subset is used.
        points: number of points per region and view.
        positives: ``"region"``: points are drawn independently in each view, and their id is the
            region's label. ``"location"``: a key point is at the query point's location in the
            image, and their id is the location.
        cells: number of cells per side of the grid on which regions are looked up and places are
            matched.
        pairs: number of places that query and partner share; 0: no partner.
        crop_area: range of a crop's fraction of the image.
        min_overlap: minimum overlap of query and partner.
        max_draws: maximum number of draws of query and partner; the last one is kept.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        size: int,
        photometry: Photometry,
        maps: MapSource,
        num_regions: int = 16,
        points: int = 16,
        positives: str = "region",
        cells: int = 56,
        pairs: int = 256,
        crop_area: Sequence[float] = (0.2, 1.0),
        min_overlap: float = 0.5,
        max_draws: int = 101,
    ) -> None:
        area = checked_crop_area(size, crop_area)
        if positives not in POSITIVES:
            raise UserError(f"views.positives={positives!r} must be one of {', '.join(POSITIVES)}")
        counts = dict(num_regions=num_regions, points=points, cells=cells, max_draws=max_draws)
        for name, value in {**counts, "pairs": pairs}.items():
            if value < (name in counts):
                raise UserError(f"views.{name}={value} must be at least {int(name in counts)}")
        if not 0 <= min_overlap <= 1:
            raise UserError(f"views.min_overlap={min_overlap} must be in [0, 1]")
        self.size = (size, size)
        self.photometry = photometry
        self.maps, self.needs_regions = maps, isinstance(maps, BoxMaps)
        self.num_regions, self.points, self.pairs = num_regions, points, pairs
        self.positives = positives
        self.cells = cells
        self.crop_area = area
        self.min_overlap, self.max_draws = min_overlap, max_draws
        centers = (np.arange(cells) + 0.5) * (size / cells)
        #: (cells * cells, 2) x and y in view pixels.
        self.centers = np.stack(np.meshgrid(centers, centers), axis=-1).reshape(-1, 2)

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """See :class:`~region_pretrain.data.views.ViewSampler`.

        If the region maps need pixels, :meth:`complete` adds the points of regions.
        """
        query, partner, key = self._draw_crops(width, height, rng)
        no_points = _Points.none(self.num_regions * self.points)
        if not self.pairs:
            samples = [self._sample(query, no_points), self._sample(key, no_points)]
        else:
            here, there = self._draw_places(query, partner, rng)
            samples = [
                self._sample(query, no_points.then(here)),
                self._sample(key, no_points),
                self._sample(partner, there),
            ]
        if self.maps.needs_pixels:
            return samples
        return self._fill_regions(samples, self.maps(width, height, boxes, None), rng)

    def complete(
        self,
        views: list[ViewSample],
        image: np.ndarray,
        size: tuple[int, int],
        rng: np.random.Generator,
    ) -> list[ViewSample]:
        """See :class:`~region_pretrain.data.views.ViewSampler`."""
        if not self.maps.needs_pixels:
            return views
        region_map = self.maps(*size, np.zeros((0, 4), np.float32), image)
        return self._fill_regions(views, region_map, rng)

    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]]:
        """Draw the points of each image.

        Args:
            batch: a batch of these views.

        Returns:
            For each image query and key view with the points of their regions, one colour per
            region, and query and partner with some of their shared places, one colour and number
            per place: (H, W, 3) uint8 RGB.
        """
        return draw_views(batch, self.num_regions * self.points)

    def _draw_crops(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[ViewGeometry, ViewGeometry, ViewGeometry]:
        """Draw the crops of query, partner and key."""
        key = random_resized_crop(width, height, self.size, rng, self.crop_area)
        for _ in range(self.max_draws if self.pairs else 1):
            query, partner = (
                random_resized_crop(width, height, self.size, rng, self.crop_area) for _ in range(2)
            )
            if crop_overlap(query.crop_box, partner.crop_box) >= self.min_overlap:
                break
        return query, partner, key

    def _draw_places(
        self, query: ViewGeometry, partner: ViewGeometry, rng: np.random.Generator
    ) -> tuple[_Points, _Points]:
        """Draw places that query and partner share, in each view."""
        matched = match_cells(view_window(query), view_window(partner), self.cells)
        if len(matched) > self.pairs:
            matched = matched[np.sort(rng.choice(len(matched), self.pairs, replace=False))]
        found = []
        for column in matched.T:
            points = _Points.none(self.pairs)
            points.xy[: len(matched)] = self.centers[column]
            points.ids[:] = PLACE_IDS + np.arange(self.pairs)
            points.valid[: len(matched)] = True
            found.append(points)
        return found[0], found[1]

    def _fill_regions(
        self, samples: list[ViewSample], region_map: RegionMap, rng: np.random.Generator
    ) -> list[ViewSample]:
        """Put points of regions into the first slots of query and key view."""
        query, key = (sample.geometry for sample in samples[:2])
        count = self.num_regions * self.points
        points = (_Points.none(count), _Points.none(count))
        cells = self._cells_of_regions(query, key, region_map)
        regions = np.array(sorted(cells), np.int64)
        if len(regions) > self.num_regions:
            regions = np.sort(rng.choice(regions, self.num_regions, replace=False))
        for k, region in enumerate(regions.tolist()):
            slots = slice(k * self.points, (k + 1) * self.points)
            if self.positives == "location":
                cell = rng.choice(cells[region][0], self.points)
                drawn = [self.centers[cell]]
                drawn.append(map_points(key.affine, query.original_points(drawn[0])))
                ids = 1 + cell  # a cell that is drawn twice is not its own negative
            else:
                drawn = [self.centers[rng.choice(mine, self.points)] for mine in cells[region]]
                ids = region
            for mine, xy in zip(points, drawn, strict=True):
                mine.xy[slots], mine.ids[slots], mine.valid[slots] = xy, ids, True
        for sample, mine in zip(samples, points, strict=False):
            sample.boxes[:count] = np.tile(mine.xy, 2)
            sample.region_ids[:count], sample.valid[:count] = mine.ids, mine.valid
        return samples

    def _cells_of_regions(
        self, query: ViewGeometry, key: ViewGeometry, region_map: RegionMap
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The cells of each region that both views see, in each view.

        If positives are locations, these are the query's cells that the key view shows.
        """
        places = query.original_points(self.centers), key.original_points(self.centers)
        labels = [region_map(xy) for xy in places]
        if self.positives == "location":
            x0, y0, x1, y1 = key.crop_box
            x, y = places[0].T
            shown = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
            labels[0] = labels[1] = np.where(shown, labels[0], NO_REGION)
        both = np.intersect1d(labels[0], labels[1])
        return {
            region: tuple(np.flatnonzero(mine == region) for mine in labels)
            for region in both.tolist()
            if region != NO_REGION
        }

    def _sample(self, geometry: ViewGeometry, points: _Points) -> ViewSample:
        boxes = np.tile(points.xy, 2).astype(np.float32)
        # Copies, as regions are filled in later for each view separately.
        return ViewSample(geometry, self.photometry, boxes, points.ids.copy(), points.valid.copy())


class _Points(NamedTuple):
    """Slots of a view: ``(n, 2)`` x and y in its pixels, ``(n,)`` ids, ``(n,)`` validity."""

    xy: np.ndarray
    ids: np.ndarray
    valid: np.ndarray

    @classmethod
    def none(cls, count: int) -> _Points:
        return cls(np.zeros((count, 2)), np.zeros(count, np.int64), np.zeros(count, bool))

    def then(self, other: _Points) -> _Points:
        return _Points(*(np.concatenate(both) for both in zip(self, other, strict=True)))
