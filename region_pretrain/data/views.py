"""What a view sampler is, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from region_pretrain.contract import Contract
from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.geometry import ViewGeometry
from region_pretrain.data.photometry import Photometry


@dataclass
class ViewSample:
    """One view of one image, before it is rendered.

    Attributes:
        geometry: where the view looks.
        photometry: which photometric operations it may undergo.
        boxes: ``(K, 4)`` float32 XYXY in view pixels.
        region_ids: ``(K,)`` int64.
        valid: ``(K,)`` bool.
    """

    geometry: ViewGeometry
    photometry: Photometry
    boxes: np.ndarray
    region_ids: np.ndarray
    valid: np.ndarray


class ViewSampler(Contract, ABC):
    """Base class of what a method owns of the data path: it chooses each image's views.

    ``K``, the number of slots for regions in a view, and the views' sizes never change. All
    randomness comes from the generator that is passed in, so a sample is the same with any number
    of loader workers and after a resume.
    """

    @abstractmethod
    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """Choose the views of an image.

        Args:
            width, height: the image in pixels.
            boxes: ``(N, 4)`` float32 XYXY regions in its pixels; N may be 0.
            rng: the only source of randomness.
        """

    def complete(
        self,
        views: list[ViewSample],
        image: np.ndarray,
        size: tuple[int, int],
        rng: np.random.Generator,
    ) -> list[ViewSample]:
        """Add regions that depend on the pixels, once the image has been decoded.

        Args:
            views: chosen by :meth:`__call__`.
            image: ``(h, w, 3)`` uint8 RGB, perhaps decoded at a fraction of its size.
            size: ``(width, height)`` of the original image in pixels.
            rng: the sample's generator.

        Returns:
            The views, with the same geometries.
        """
        return views

    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]] | None:
        """Draw what the network makes of the views before its first layer (montages, points).

        Returns:
            For each image of the batch a row of ``(H, W, 3)`` uint8 RGB pictures, or None where the
            views themselves are what the network sees.
        """
        return None
