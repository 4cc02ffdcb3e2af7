"""View geometry: a crop, an output size and a flip, equivalent to one affine matrix.

Coordinates are continuous and half-open as in Detectron2: a pixel covers ``[i, i + 1)``, a box
over the full width ends at ``W``. Boxes, points and grids are mapped from the image to a view by
:attr:`ViewGeometry.affine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

_MIRRORED = np.array([2, 1, 0, 3])  # order of XYXY in a mirrored box


@dataclass(frozen=True)
class ViewGeometry:
    """A crop of the original image, resized and optionally flipped.

    Attributes:
        left, top, width, height: the crop in pixels of the original image.
        size: ``(height, width)`` of the view in pixels.
        flip: whether the view is mirrored horizontally.
    """

    left: int
    top: int
    width: int
    height: int
    size: tuple[int, int]
    flip: bool = False

    @property
    def affine(self) -> np.ndarray:
        """``(2, 3)`` float32, from original pixels to view pixels."""
        sy, sx = self.size[0] / self.height, self.size[1] / self.width
        matrix = np.array([[sx, 0, -sx * self.left], [0, sy, -sy * self.top]], np.float32)
        if self.flip:
            matrix[0] = (-sx, 0, self.size[1] + sx * self.left)
        return matrix

    def original_points(self, points: np.ndarray) -> np.ndarray:
        """Map points of the view to the original image: the inverse of :attr:`affine`.

        Args:
            points: ``(..., 2)`` x and y in view pixels.

        Returns:
            ``(..., 2)`` float64 in original pixels.
        """
        x, y = points[..., 0] / self.size[1], points[..., 1] / self.size[0]
        x = 1 - x if self.flip else x
        return np.stack([self.left + x * self.width, self.top + y * self.height], axis=-1)

    @property
    def crop_box(self) -> np.ndarray:
        """The crop as ``(4,)`` float32 XYXY in original pixels."""
        corners = (self.left, self.top, self.left + self.width, self.top + self.height)
        return np.array(corners, np.float32)


def map_points(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points through an affine.

    Args:
        affine: ``(2, 3)``.
        points: ``(..., 2)`` in original pixels.

    Returns:
        ``(..., 2)`` in view pixels.
    """
    return points @ affine[:, :2].T + affine[:, 2]


def map_boxes(affine: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Map boxes through a view's affine; a mirroring one swaps left and right.

    Args:
        affine: ``(2, 3)``.
        boxes: ``(N, 4)`` XYXY in original pixels.

    Returns:
        ``(N, 4)`` float32 XYXY in view pixels, not clipped.
    """
    (sx, _, tx), (_, sy, ty) = affine.tolist()
    mapped = boxes * np.array((sx, sy, sx, sy), np.float32)
    mapped += np.array((tx, ty, tx, ty), np.float32)
    if sx < 0:
        mapped = mapped.take(_MIRRORED, axis=1)
    return mapped.astype(np.float32, copy=False)


def clip_boxes(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Clip ``(N, 4)`` XYXY boxes to ``[0, width] x [0, height]``."""
    limit = np.array([width, height, width, height], np.float32)
    return np.minimum(np.maximum(boxes, 0), limit).astype(np.float32, copy=False)


def boxes_in_view(geometry: ViewGeometry, boxes: np.ndarray) -> np.ndarray:
    """Map boxes of the original image to a view and clip them to it.

    Args:
        geometry: the view.
        boxes: ``(N, 4)`` XYXY in original pixels.

    Returns:
        ``(N, 4)`` float32 XYXY in view pixels. A box outside the crop has no area.
    """
    height, width = geometry.size
    return clip_boxes(map_boxes(geometry.affine, boxes), width, height)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """``(N,)`` bool: which of the ``(N, 4)`` boxes overlap the ``(4,)`` box."""
    left, top, right, bottom = box.tolist()
    x0, y0, x1, y1 = boxes.T
    across = (x0 < right) & (x1 > left) & (x0 < x1)
    return across & (y0 < bottom) & (y1 > top) & (y0 < y1)


def random_resized_crop(
    width: int,
    height: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> ViewGeometry:
    """Inception-style crop (torchvision's ``RandomResizedCrop``), flipped with probability 0.5.

    Args:
        width, height: size of the original image in pixels.
        size: ``(height, width)`` of the view.
        rng: the sample's generator.
        area: range of the crop's area as a fraction of the image's, sampled uniformly.
        aspect: range of width / height, sampled log-uniformly.

    Returns:
        The view's geometry; after ten crops that do not fit, the largest centre crop whose aspect
        ratio is in range.
    """
    flip = bool(rng.random() < 0.5)
    least, most = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        # As rng.uniform(), in a third of the time: this runs for every view.
        target = width * height * (area[0] + (area[1] - area[0]) * rng.random())
        ratio = math.exp(least + (most - least) * rng.random())
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return ViewGeometry(left, top, w, h, size, flip)
    w, h = width, height
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return ViewGeometry((width - w) // 2, (height - h) // 2, w, h, size, flip)


def whole_image(
    width: int, height: int, size: tuple[int, int], rng: np.random.Generator
) -> ViewGeometry:
    """The whole image, stretched to ``size`` and flipped with probability 0.5."""
    return ViewGeometry(0, 0, width, height, size, bool(rng.random() < 0.5))


def decode_reduction(geometries: Sequence[ViewGeometry]) -> int:
    """The largest factor by which an image may be downscaled in decoding, given its views.

    JPEG decoders return an image at 1/2, 1/4 or 1/8 of its size in a fraction of the time. Crops
    are then rounded to whole pixels of the smaller image. Each view still has to downscale that
    image by 2 or more, so the error is at most a quarter of a view's pixel.

    Returns:
        1, 2, 4 or 8.
    """
    shrinks = min(min(g.width / g.size[1], g.height / g.size[0]) for g in geometries)
    return next((reduce for reduce in (8, 4, 2) if shrinks >= 2 * reduce), 1)


def render(
    image: np.ndarray,
    geometry: ViewGeometry,
    out: np.ndarray,
    antialias: bool = True,
    reduce: int = 1,
) -> np.ndarray:
    """Render a view of a decoded image.

    Args:
        image: ``(ceil(H / reduce), ceil(W / reduce), 3)`` uint8.
        geometry: the view.
        out: ``(h, w, 3)`` uint8, contiguous; written in place.
        antialias: widen the bilinear filter when downscaling (a view of 112 pixels of a large crop
            aliases otherwise); ``False`` is plain bilinear interpolation, which is faster.
        reduce: factor by which the image was downscaled in decoding (:func:`decode_reduction`).

    Returns:
        ``out``.
    """
    left, right = (round(x / reduce) for x in (geometry.left, geometry.left + geometry.width))
    top, bottom = (round(y / reduce) for y in (geometry.top, geometry.top + geometry.height))
    crop = image[top:bottom, left:right]
    h, w = geometry.size
    if antialias:
        # The antialiased bilinear filter of torchvision and Pillow; torch's vectorised code for
        # uint8, channels last, takes a quarter of the time of OpenCV's INTER_AREA.
        x = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(h, w), mode="bilinear", antialias=True)
        out[...] = x.permute(0, 2, 3, 1)[0].numpy()
    else:
        cv2.resize(crop, (w, h), dst=out, interpolation=cv2.INTER_LINEAR)
    return cv2.flip(out, 1, dst=out) if geometry.flip else out
