"""The batch that a loader passes to a meta-architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from region_pretrain.data.device import to_device


@dataclass
class View:
    """One view of each image of a batch, and the regions in it.

    Only the pixels move to the device. The other tensors, a few kilobytes, stay on the CPU, where a
    model assigns boxes to levels and matches pairs without waiting for the device.

    Attributes:
        images: ``(B, 3, H, W)`` uint8 RGB, channels-last in memory, before photometry.
        boxes: ``(B, K, 4)`` float32 XYXY in view pixels.
        valid: ``(B, K)`` bool; false where the slot contains no region.
        region_ids: ``(B, K)`` int64; in all views of an image, equal ids denote the same region.
        affine: ``(B, 2, 3)`` float32, from original pixels to view pixels.
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

    def to(self, device: torch.device | str) -> View:
        """A copy of the view with its images on a device; does not wait for the copy."""
        return replace(self, images=to_device(self.images, device))


@dataclass
class ViewBatch:
    """Views of the same images, in the order of the view sampler.

    Attributes:
        views: one :class:`View` per view.
        indices: ``(B,)`` int64, the images' positions in the data set. A file that cannot be read
            is replaced by the next one, under the same index.
        labels: ``(B,)`` int64, the images' classes, if the data set reads them. They stay on the
            CPU, too.
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

    def to(self, device: torch.device | str) -> ViewBatch:
        """A copy of the batch with its views' images on a device; does not wait for the copy."""
        return replace(self, views=[view.to(device) for view in self.views])

    def pin_memory(self) -> ViewBatch:
        """The batch in page-locked memory; ``DataLoader`` calls this."""
        return self._map(Tensor.pin_memory)

    def chunk(self, parts: int) -> list[ViewBatch]:
        """Split into consecutive micro-batches whose sizes differ by at most one."""
        cuts = [len(self) * i // parts for i in range(parts + 1)]
        return [
            self._map(lambda t, a=a, b=b: t[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
