"""From a uint8 view to the backbone's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from region_pretrain.data.batch import View
from region_pretrain.data.photometry import apply_photometry
from region_pretrain.errors import UserError


def format_of_mean(pixel_mean: Sequence[float]) -> str | None:
    """The channel order of a mean: the means of photographs are higher for red than for blue.

    Detectron2's FCOS has a ``pixel_mean`` and no ``input_format``.

    Args:
        pixel_mean: three values.

    Returns:
        ``"RGB"`` or ``"BGR"``; None if the first value equals the last.
    """
    first, last = pixel_mean[0], pixel_mean[-1]
    return None if first == last else "RGB" if first > last else "BGR"


def channel_order(input_format: str | None, pixel_mean: Sequence[float] | None) -> str:
    """A detector's ``input_format``, otherwise that of its mean, otherwise Detectron2's BGR."""
    return input_format or (pixel_mean and format_of_mean(pixel_mean)) or "BGR"


class Preprocess(nn.Module):
    """Photometric augmentation on the device, then the detector's channel order and normalisation.

    Args:
        pixel_mean, pixel_std: the detector's, three values each in [0, 255], in the channel order
            of ``input_format``.
        input_format: the detector's, ``"RGB"`` or ``"BGR"``.

    Raises:
        UserError: ``input_format`` is neither.
    """

    def __init__(
        self, pixel_mean: Sequence[float], pixel_std: Sequence[float], input_format: str
    ) -> None:
        super().__init__()
        if input_format not in ("RGB", "BGR"):
            raise UserError(f"model.input_format={input_format!r} must be RGB or BGR")
        self.flip_channels = input_format == "BGR"
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            tensor = torch.tensor(list(value), dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    @torch.compiler.disable  # each batch applies the operations to other samples
    @torch.no_grad()
    def forward(self, view: View) -> Tensor:
        """The view's images as ``(B, 3, H, W)`` float32, in the detector's order and normalised."""
        with torch.autocast(view.images.device.type, enabled=False):
            images = view.images.to(self.pixel_mean.device).float() / 255
            images = apply_photometry(images, view.photometry, self._mean_rgb()) * 255
            if self.flip_channels:
                images = images.flip(1)
            return (images - self.pixel_mean) / self.pixel_std

    def together(self, views: Sequence[View]) -> list[Tensor]:
        """The same for several views, with fewer GPU kernels: those of one size share a pass."""
        groups: dict[tuple, list[int]] = {}
        for i, view in enumerate(views):
            shapes = view.images.shape[1:], view.photometry.shape[1:]
            groups.setdefault(shapes, []).append(i)
        found: dict[int, Tensor] = {}
        for group in groups.values():
            images = torch.cat([views[i].images for i in group])
            photometry = torch.cat([views[i].photometry for i in group])
            joined = self(replace(views[group[0]], images=images, photometry=photometry))
            parts = joined.split([len(views[i].images) for i in group])
            found.update(zip(group, parts, strict=True))
        return [found[i] for i in range(len(views))]

    def _mean_rgb(self) -> Tensor:
        """The colour that normalisation maps to 0: ``(3, 1, 1)`` in [0, 1]."""
        return (self.pixel_mean.flip(0) if self.flip_channels else self.pixel_mean) / 255
