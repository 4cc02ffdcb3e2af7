"""What a loader hands to a meta-architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class View:
    """One view of each image of a batch, with the regions that live in it.

    Only the pixels go to the device. What describes them stays on the CPU, where it is a few
    kilobytes and where a model decides what goes where (which box on which level, which pairs
    match) without waiting for the device.

    Attributes:
        images: ``(B, 3, H, W)`` uint8 RGB, channels-last in memory, before photometry.
        boxes: ``(B, K, 4)`` float32 XYXY in view pixels.
        valid: ``(B, K)`` bool; where false, the slot holds no region.
        region_ids: ``(B, K)`` int64; equal ids of an image are the same region in all its views.
        affine: ``(B, 2, 3)`` float32, original pixels to view pixels.
        photometry: ``(B, P)`` float32 parameters of
            :func:`~region_pretrain.data.photometry.apply_photometry`.
    """

    images: Tensor
    boxes: Tensor
    valid: Tensor
    region_ids: Tensor
    affine: Tensor
    photometry: Tensor

    def _map(self, function: Callable[[Tensor], Tensor]) -> View:
        return View(**{name: function(value) for name, value in vars(self).items()})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> View:
        """The view with its images on a device."""
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))


@dataclass
class ViewBatch:
    """Views of the same images, in the order of the view sampler.

    Attributes:
        views: one :class:`View` each.
        indices: ``(B,)`` int64, the images' positions in the data set. (The place of a file that
            cannot be read is taken by the next one, under the same index.)
        labels: ``(B,)`` int64, the images' classes, where the data set reads them. They stay on the
            CPU as well.
    """

    views: list[View]
    indices: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def _map(self, function: Callable[[Tensor], Tensor]) -> ViewBatch:
        labels = None if self.labels is None else function(self.labels)
        views = [view._map(function) for view in self.views]
        return ViewBatch(views, function(self.indices), labels)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ViewBatch:
        """The batch with its views' images on a device."""
        views = [view.to(device, non_blocking) for view in self.views]
        return replace(self, views=views)

    def pin_memory(self) -> ViewBatch:
        """The batch in page-locked memory; ``DataLoader`` calls this."""
        return self._map(Tensor.pin_memory)

    def chunk(self, parts: int) -> list[ViewBatch]:
        """Split into micro-batches in order, of sizes that differ by at most one."""
        cuts = [len(self) * i // parts for i in range(parts + 1)]
        return [
            self._map(lambda t, a=a, b=b: t[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
