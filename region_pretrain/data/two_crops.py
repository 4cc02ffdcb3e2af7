"""Two random crops per image: the views of image-level methods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from region_pretrain.data.geometry import random_resized_crop
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.errors import UserError


def checked_crop_area(size: int, crop_area: Sequence[float]) -> tuple[float, float]:
    """Check a view's size and the range of its crop's area.

    Args:
        size: side of the view in pixels.
        crop_area: smallest and largest area of a crop, as fractions of the image's area.

    Returns:
        ``crop_area`` as a tuple.

    Raises:
        UserError: a view below 2 pixels, or a range outside (0, 1].
    """
    area = tuple(crop_area)
    if size < 2:
        raise UserError(f"a view of {size} pixels: views.size, or views.sizes, must be at least 2")
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"views.crop_area={list(area)} must be a range within (0, 1]")
    return area


class TwoCrops(ViewSampler):
    """Draws two independent random resized crops of an image, without regions.

    Args:
        size: side of both views in pixels.
        first_photometry, second_photometry: the photometric augmentation of each view.
        crop_area: smallest and largest area of a crop, as fractions of the image's area.

    Raises:
        UserError: see :func:`checked_crop_area`.
    """

    def __init__(
        self,
        size: int,
        first_photometry: Photometry,
        second_photometry: Photometry,
        crop_area: tuple[float, float] = (0.2, 1.0),
    ) -> None:
        self.crop_area = checked_crop_area(size, crop_area)
        self.size = (size, size)
        self.photometry = (first_photometry, second_photometry)

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """See :class:`~region_pretrain.data.views.ViewSampler`."""
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
        return [
            ViewSample(
                random_resized_crop(width, height, self.size, rng, self.crop_area),
                photometry,
                *none,
            )
            for photometry in self.photometry
        ]
