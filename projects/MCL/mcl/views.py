"""MCL's views: one random crop for each level of each pyramid."""

from __future__ import annotations

import numpy as np
import torch

from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.geometry import random_resized_crop
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.two_crops import checked_crop_area
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.projects.mcl.montage import Montage
from region_pretrain.reporting.boxes import draw_regions
from region_pretrain.reporting.pictures import view_pixels


class MCLViews(ViewSampler):
    """Draws ``2 * len(ratios)`` full-size crops of an image: the query pyramid's, then the key's.

    Each level has its own crop, coarse levels first. The model shrinks and tiles them on its
    device. Regions are not used: the only box of each view is the complete view.

    Args:
        montage: determines size and number of the views.
        query_photometry, key_photometry: photometric augmentation of each pyramid.
        crop_area: range of a crop's area as a fraction of the image.
    """

    def __init__(
        self,
        montage: Montage,
        query_photometry: Photometry,
        key_photometry: Photometry,
        crop_area: tuple[float, float] = (0.2, 1.0),
    ) -> None:
        self.montage = montage
        self.photometry = [query_photometry, key_photometry]
        self.crop_area = checked_crop_area(montage.size, crop_area)

    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """See :class:`~region_pretrain.data.views.ViewSampler`."""
        size = (self.montage.size, self.montage.size)
        whole = np.array([[0, 0, *size]], np.float32)
        return [
            ViewSample(
                random_resized_crop(width, height, size, rng, self.crop_area),
                photometry,
                whole,
                np.zeros(1, np.int64),
                np.ones(1, bool),
            )
            for photometry in self.photometry
            for _ in self.montage.ratios
        ]

    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]]:
        """Draw the first canvas of each level.

        Args:
            batch: views from this sampler.

        Returns:
            One row per pyramid, one picture per level: ``(H, W, 3)`` uint8 RGB, not normalised. A
            tile's number is the index of its image in the batch. An image has the same colour on
            all levels; images that occur in a single canvas are grey.
        """
        levels, generator = len(self.montage.ratios), torch.Generator().manual_seed(0)
        rows = []
        for start in range(0, len(batch.views), levels):
            pixels = [
                torch.from_numpy(view_pixels(view)).permute(0, 3, 1, 2).float()
                for view in batch.views[start : start + levels]
            ]
            slots = self.montage.draw(len(batch), generator)
            counts = self.montage.counts(slots)
            firsts = np.cumsum([0, *counts[:-1]]).tolist()
            canvases = self.montage.canvases(pixels, slots)[firsts]
            canvases = canvases.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            drawn = []
            for i, canvas in enumerate(canvases):
                boxes = self.montage.tile_boxes(i)
                ids = slots[i][: len(boxes)].tolist()
                drawn.append((canvas.numpy(), boxes.numpy(), ids))
            rows.append(draw_regions(drawn, labels_inside=True))
        return rows
