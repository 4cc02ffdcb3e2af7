"""Region maps: the region of each point of an image, in closed form or from a label image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from scipy.cluster.vq import vq

from region_pretrain.errors import UserError, did_you_mean

#: The label of points outside all regions; regions are labelled from 1.
NO_REGION = 0


class RegionMap(Protocol):
    """The regions of one image."""

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Look up points.

        Args:
            points: ``(..., 2)`` continuous x and y in pixels of the original image, within it.

        Returns:
            ``(...)`` int64 labels, or :data:`NO_REGION`.
        """


class MapSource(Protocol):
    """Creates the region map of each image.

    Attributes:
        needs_pixels: whether it needs the image, and not only its size and its boxes.
    """

    needs_pixels: bool

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, image: np.ndarray | None
    ) -> RegionMap:
        """Create the region map of an image, a function of the arguments alone.

        Args:
            width, height: size of the original image in pixels.
            boxes: ``(N, 4)`` XYXY in its pixels, from a region store; N may be 0.
            image: ``(h, w, 3)`` uint8 RGB, the whole image, possibly decoded at a reduced size;
                None for a source that needs no pixels.
        """


@dataclass(frozen=True)
class GridMap:
    """A grid of ``n x n`` equal cells, labelled ``n * row + column + 1``."""

    width: int
    height: int
    n: int

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """See :class:`RegionMap`."""
        column, row = (
            np.clip(np.floor(points[..., axis] * (self.n / side)), 0, self.n - 1).astype(np.int64)
            for axis, side in enumerate((self.width, self.height))
        )
        return self.n * row + column + 1


@dataclass(frozen=True)
class BoxMap:
    """A point belongs to the smallest box around it; box i has the label i + 1."""

    boxes: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """See :class:`RegionMap`."""
        if not len(self.boxes):
            return np.full(points.shape[:-1], NO_REGION, np.int64)
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        order = np.argsort(sides[:, 0] * sides[:, 1], kind="stable")
        x0, y0, x1, y1 = self.boxes[order].T[..., None]
        x, y = points.reshape(-1, 2).T
        inside = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)  # (N, M), smallest box first
        labels = np.where(inside.any(axis=0), order[inside.argmax(axis=0)] + 1, NO_REGION)
        return labels.reshape(points.shape[:-1])


@dataclass(frozen=True)
class LabelImage:
    """A label image of the whole image, at any resolution.

    Attributes:
        labels: ``(h, w)`` integers.
        width, height: size of the original image in pixels.
    """

    labels: np.ndarray
    width: int
    height: int

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """See :class:`RegionMap`."""
        h, w = self.labels.shape
        column = np.clip((points[..., 0] * (w / self.width)).astype(np.int64), 0, w - 1)
        row = np.clip((points[..., 1] * (h / self.height)).astype(np.int64), 0, h - 1)
        return self.labels[row, column].astype(np.int64)


@dataclass(frozen=True)
class GridMaps:
    """A grid over the whole image, in closed form.

    Attributes:
        n: cells per side.
    """

    n: int = 4
    needs_pixels = False

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, image: np.ndarray | None = None
    ) -> RegionMap:
        """See :class:`MapSource`."""
        return GridMap(width, height, self.n)


@dataclass(frozen=True)
class BoxMaps:
    """The boxes of the region store, of any recipe."""

    needs_pixels = False

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, image: np.ndarray | None = None
    ) -> RegionMap:
        """See :class:`MapSource`."""
        return BoxMap(boxes)


class _PixelMaps:
    """A source of label images, computed on a downscaled copy of the image."""

    needs_pixels = True

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, image: np.ndarray | None
    ) -> RegionMap:
        """See :class:`MapSource`."""
        scale = self.working_size / max(image.shape[:2])
        if scale < 1:
            size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return LabelImage(self.labels(np.ascontiguousarray(image)), width, height)


def color_and_place(image: np.ndarray, place: float) -> np.ndarray:
    """Features of pixels: CIELAB colour and position.

    Args:
        image: ``(h, w, 3)`` uint8 RGB.
        place: length of the image's longer side, relative to the range of lightness (100).

    Returns:
        ``(h, w, 5)`` float32.
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    y, x = np.indices(image.shape[:2], np.float32) * (100 * place / max(image.shape[:2]))
    return np.concatenate([lab, x[..., None], y[..., None]], axis=2)


@dataclass(frozen=True)
class KMeansMaps(_PixelMaps):
    """Clusters of an image's pixels by k-means, initialised on a grid.

    Attributes:
        clusters: largest number of regions.
        working_size: long side of the clustered copy in pixels.
        place: weight of position against colour, see :func:`color_and_place`.
        iterations: number of k-means iterations.
        features: maps ``(h, w, 3)`` uint8 RGB to ``(h', w', C)`` features to cluster instead, such
            as a network's feature map.
    """

    clusters: int = 16
    working_size: int = 64
    place: float = 0.5
    iterations: int = 10
    features: Callable[[np.ndarray], np.ndarray] | None = None

    def labels(self, image: np.ndarray) -> np.ndarray:
        """``(h, w)`` int64 labels for ``(h, w, 3)`` uint8 RGB."""
        if self.features is None:
            features = color_and_place(image, self.place)
        else:
            features = np.asarray(self.features(image))
        h, w = features.shape[:2]
        flat = features.reshape(h * w, -1).astype(np.float64)
        rows = min(max(1, round(np.sqrt(self.clusters * h / w))), self.clusters, h)
        columns = min(-(-self.clusters // rows), w)
        y, x = (
            ((np.arange(n) + 0.5) / n * side).astype(int) for n, side in ((rows, h), (columns, w))
        )
        means = flat.reshape(h, w, -1)[y[:, None], x].reshape(rows * columns, -1)[: self.clusters]
        for _ in range(self.iterations):
            nearest, _ = vq(flat, means)
            sizes = np.bincount(nearest)
            sums = np.stack([np.bincount(nearest, channel) for channel in flat.T], axis=1)
            means = sums[sizes > 0] / sizes[sizes > 0, None]
        return vq(flat, means)[0].reshape(h, w) + 1


@dataclass(frozen=True)
class SLICMaps(_PixelMaps):
    """Superpixels of even size: scikit-image's SLIC (Achanta et al. 2012).

    Attributes:
        segments: approximate number of regions.
        compactness: weight of position against colour.
        working_size: long side of the segmented copy in pixels.
    """

    segments: int = 16
    compactness: float = 20.0
    working_size: int = 96

    def labels(self, image: np.ndarray) -> np.ndarray:
        """``(h, w)`` labels for ``(h, w, 3)`` uint8 RGB."""
        from skimage.segmentation import slic  # imported here because it takes half a second

        return slic(
            image,
            n_segments=self.segments,
            compactness=self.compactness,
            start_label=1,
            channel_axis=-1,
        )


@dataclass(frozen=True)
class FelzenszwalbMaps(_PixelMaps):
    """Superpixels along edges: scikit-image's felzenszwalb (Felzenszwalb and Huttenlocher 2004).

    Attributes:
        scale: larger values yield larger regions.
        sigma: standard deviation of the preceding blur, in pixels of the copy.
        min_area: smallest area of a region, as a fraction of the image's.
        working_size: long side of the segmented copy in pixels.
    """

    scale: float = 200.0
    sigma: float = 0.5
    min_area: float = 0.01
    working_size: int = 96

    def labels(self, image: np.ndarray) -> np.ndarray:
        """``(h, w)`` labels for ``(h, w, 3)`` uint8 RGB."""
        from skimage.segmentation import felzenszwalb  # slow to import, as above

        min_size = round(self.min_area * image.shape[0] * image.shape[1])
        labels = felzenszwalb(
            image, scale=self.scale, sigma=self.sigma, min_size=min_size, channel_axis=-1
        )
        return labels + 1


KINDS: dict[str, type] = {
    "grid": GridMaps,
    "boxes": BoxMaps,
    "kmeans": KMeansMaps,
    "slic": SLICMaps,
    "felzenszwalb": FelzenszwalbMaps,
}


def region_maps(kind: str = "grid", **options: Any) -> MapSource:
    """Create a source of region maps.

    Args:
        kind: its name in :data:`KINDS`.
        options: its attributes that differ from the defaults.

    Raises:
        UserError: an unknown kind or option, or a value that is not positive.
    """
    if kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS, cutoff=0.4)
        raise UserError(
            f"unknown region maps kind={kind!r}: must be one of {', '.join(KINDS)}{hint}"
        )
    known = {field.name: field.default for field in dataclasses.fields(KINDS[kind])}
    for name, value in options.items():
        if name not in known:
            has = ", ".join(known) or "none"
            raise UserError(f"region maps of kind={kind} have no option {name!r}; options: {has}")
        whole = isinstance(known[name], int)
        if name != "features" and not (value > 0 and (not whole or value == int(value))):
            number = "a whole number" if whole else "a number"
            raise UserError(f"region maps of kind={kind}: {name}={value} is not {number} above 0")
    return KINDS[kind](**options)
