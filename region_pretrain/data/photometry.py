"""Photometric augmentation of a batch: colours, blur, solarisation and cut-out per sample.

A loader's worker draws a view's parameters, one row of numbers, from the sample's generator. The
operations run later, batched, on the model's device. They are those of
``torchvision.transforms.v2.functional`` on float images, in the order of MoCo v2 and BYOL (appendix
B): colour jitter, greyscale, blur, solarisation.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError


class PhotometryLayout(IntEnum):
    """The columns of a row of parameters."""

    BRIGHTNESS = 0  #: factor
    CONTRAST = 1  #: factor
    SATURATION = 2  #: factor
    HUE = 3  #: shift, in turns of the colour wheel
    FIRST = 4  #: the column above that is applied first
    SECOND = 5
    THIRD = 6
    FOURTH = 7
    GRAY = 8  #: 1 for greyscale, else 0
    BLUR_SIGMA = 9  #: standard deviation in view pixels; 0 for none
    SOLARIZE_FROM = 10  #: values at or above it are inverted; infinity for none


#: The row of parameters that leaves an image unchanged.
IDENTITY = np.array([1, 1, 1, 0, 0, 1, 2, 3, 0, 0, np.inf], dtype=np.float32)
IDENTITY.setflags(write=False)
_IDENTITY = IDENTITY.tolist()
_ORDERS = list(itertools.permutations((0.0, 1.0, 2.0, 3.0)))
_DRAWS = 10  # four decisions, three factors, hue, order, sigma

#: On a CPU a group of samples is processed in pieces of about this many pixels, which stay in the
#: cache between elementwise operations: 25 % faster at 224 x 224.
_PIXELS_IN_CACHE = 65536
#: On a GPU this many pixels bound the temporaries to about 1 GiB.
_PIXELS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Photometry:
    """The distribution of a view's parameters; the defaults leave images unchanged.

    Attributes:
        brightness: the factor is uniform in ``[max(0, 1 - brightness), 1 + brightness]``.
        contrast: the same for contrast.
        saturation: the same for saturation.
        hue: the shift is uniform in ``[-hue, hue]``, in turns of the colour wheel; at most 0.5.
        jitter_prob: probability of applying the four above, in random order.
        gray_prob: probability of converting to greyscale.
        blur_prob: probability of a Gaussian blur.
        blur_sigma: range of the blur's sigma, sampled uniformly, in view pixels.
        solarize_prob: probability of solarisation.
        solarize_threshold: values at or above it are inverted; 0.5 inverts 8-bit values from 128.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_prob: float = 0.0
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0
    solarize_threshold: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "blur_sigma":
                if not 0 < value[0] <= value[1]:
                    raise UserError(f"photometry: blur_sigma={value} is not 0 < low <= high")
                continue
            unbounded = field.name in ("brightness", "contrast", "saturation")
            high = math.inf if unbounded else 0.5 if field.name == "hue" else 1.0
            if not 0 <= value <= high:
                raise UserError(f"photometry: {field.name}={value} is not in [0, {high}]")

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the parameters of one view.

        Each call consumes the same number of random numbers, whatever the outcome.

        Returns:
            ``(P,)`` float32, see :class:`PhotometryLayout`.
        """
        # Python floats: this runs for every view, and NumPy is slow on single values.
        draws = rng.random(_DRAWS).tolist()
        jitter, gray, blur, solarize, *factors, hue, order, sigma = draws
        row = list(_IDENTITY)
        if jitter < self.jitter_prob:
            for i, strength in enumerate((self.brightness, self.contrast, self.saturation)):
                low = max(0.0, 1 - strength)
                row[i] = low + (1 + strength - low) * factors[i]
            row[PhotometryLayout.HUE] = self.hue * (2 * hue - 1)
            row[PhotometryLayout.FIRST : PhotometryLayout.GRAY] = _ORDERS[int(24 * order)]
        if gray < self.gray_prob:
            row[PhotometryLayout.GRAY] = 1.0
        if blur < self.blur_prob:
            low, high = self.blur_sigma
            row[PhotometryLayout.BLUR_SIGMA] = low + (high - low) * sigma
        if solarize < self.solarize_prob:
            row[PhotometryLayout.SOLARIZE_FROM] = self.solarize_threshold
        return np.array(row, np.float32)


@dataclass(frozen=True)
class CutOut:
    """A view's :class:`Photometry`, after which squares inside some of its boxes are covered.

    Attributes:
        photometry: the view's.
        boxes: ``(N, 4)`` XYXY in view pixels.
        slots: number of squares in a row of parameters; at least N.
        prob: probability that a box is cut out, for each box.
        area: range of a square's area as a fraction of its box, sampled uniformly. Its centre is
            uniform in the box, so it may extend beyond the box.
    """

    photometry: Photometry
    boxes: np.ndarray
    slots: int
    prob: float
    area: tuple[float, float]

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the parameters of one view.

        Each call consumes the same number of random numbers, whatever the outcome.

        Returns:
            ``(P + 4 * slots,)`` float32: those of :meth:`Photometry.sample`, and the squares as
            XYXY in whole view pixels. An unused slot contains an empty square.
        """
        row = self.photometry.sample(rng)
        squares = np.zeros((self.slots, 4), np.float32)
        draws = rng.random((self.slots, 4))  # decision, area, two coordinates of the centre
        corner, size = self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]
        cut = np.flatnonzero(draws[: len(size), 0] < self.prob)
        low, high = self.area
        fraction = low + (high - low) * draws[cut, 1]
        side = np.maximum(np.rint(np.sqrt(fraction * size[cut].prod(axis=1))), 1)[:, None]
        first = np.rint(corner[cut] + draws[cut, 2:] * size[cut] - side / 2)
        squares[cut, :2], squares[cut, 2:] = first, first + side
        return np.concatenate([row, squares.ravel()])


@torch.no_grad()
def apply_photometry(images: Tensor, params: Tensor, fill: Tensor | None = None) -> Tensor:
    """Apply each image's own parameters to a batch.

    An operation runs only on the samples that need it. They are selected on the CPU, so keep
    ``params`` there to avoid waiting for a CUDA stream. Nothing here is differentiable, and
    autocast has no effect.

    Args:
        images: ``(B, 3, H, W)`` float32 RGB in [0, 1], on any device; not modified.
        params: ``(B, P)`` float32 rows of :meth:`Photometry.sample` or, with squares,
            ``(B, P + 4 M)`` of :meth:`CutOut.sample`; on the CPU.
        fill: ``(3, 1, 1)`` colour of the squares, on the images' device; default: mid-grey.

    Returns:
        ``(B, 3, H, W)`` float32 in [0, 1]; ``images`` itself if no sample changes.

    Raises:
        ValueError: the images are not a float32 RGB batch, or the parameters do not match it.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
        raise ValueError(
            f"images must be (B, 3, H, W) float32, not {tuple(images.shape)} {images.dtype}"
        )
    size = len(PhotometryLayout)
    columns = params.shape[-1]
    if params.shape != (len(images), columns) or columns < size or (columns - size) % 4:
        raise ValueError(f"params {tuple(params.shape)} for a batch of {len(images)} images")
    params, squares = params.cpu().split([size, columns - size], dim=1)
    images = _adjust(images, params)
    if not squares.any():
        return images
    fill = torch.tensor(0.5, device=images.device) if fill is None else fill
    squares = to_device(squares.view(len(images), -1, 4), images.device)
    return torch.where(_inside(squares, *images.shape[2:]), fill, images)


def _inside(squares: Tensor, height: int, width: int) -> Tensor:
    """Whether each pixel is in one of its image's ``(B, M, 4)`` squares: ``(B, 1, H, W)`` bool."""
    x = torch.arange(width, device=squares.device)
    y = torch.arange(height, device=squares.device)
    in_x = (x >= squares[..., 0:1]) & (x < squares[..., 2:3])  # (B, M, W)
    in_y = (y >= squares[..., 1:2]) & (y < squares[..., 3:4])  # (B, M, H)
    return (in_y.unsqueeze(3) & in_x.unsqueeze(2)).any(dim=1, keepdim=True)


def _adjust(images: Tensor, params: Tensor) -> Tensor:
    """:func:`apply_photometry` without squares."""
    steps = list(_plan(params.numpy()))
    if not steps:
        return images

    device = images.device
    out = images.clone(memory_format=torch.contiguous_format)
    # One copy to the device for all index sets, one for the coefficients.
    rows = torch.from_numpy(np.concatenate([rows for _, rows, _ in steps]))
    values = torch.from_numpy(np.concatenate([values for _, _, values in steps]))
    sizes = [len(rows) for _, rows, _ in steps]
    rows = to_device(rows, device).split(sizes)
    values = to_device(values, device)[:, :, None, None].split(sizes)
    pixels = _PIXELS_IN_CACHE if device.type == "cpu" else _PIXELS_AT_ONCE
    piece = max(1, pixels // (images.shape[2] * images.shape[3]))
    for (operation, _, _), group, numbers in zip(steps, rows, values, strict=True):
        for some, their in zip(group.split(piece), numbers.split(piece), strict=True):
            out.index_copy_(0, some, operation(out.index_select(0, some), their))
    return out


Operation = Callable[[Tensor, Tensor], Tensor]


def _plan(params: np.ndarray) -> Iterator[tuple[Operation, np.ndarray, np.ndarray]]:
    """The operations in order: function, indices of the samples, ``(n, 3)`` coefficients.

    Brightness, contrast and saturation are one operation, :func:`_blend`. Each sample goes through
    those before its hue shift, then through the shift, then through the others. Whatever their
    orders, a batch therefore needs at most three blends, one shift and three blends.
    """
    at = PhotometryLayout
    order = params[:, at.FIRST : at.GRAY].astype(np.int64)  # (B, 4)
    value = np.take_along_axis(params, order, axis=1)  # in the order of application
    active = value != IDENTITY[order]
    shift = active & (order == at.HUE)
    shifted = np.logical_or.accumulate(shift, axis=1)
    blend = active & ~shift
    yield from _blends(order, value, blend & ~shifted)
    if len(rows := np.flatnonzero(shift.any(axis=1))):
        yield _hue, rows, _column(6 * params[rows, at.HUE])
    yield from _blends(order, value, blend & shifted)
    if len(rows := np.flatnonzero(params[:, at.GRAY])):
        yield _gray, rows, _column(params[rows, at.GRAY])
    if len(rows := np.flatnonzero(params[:, at.BLUR_SIGMA])):
        radius = math.ceil(3 * params[:, at.BLUR_SIGMA].max())
        yield functools.partial(_blur, radius=radius), rows, _column(params[rows, at.BLUR_SIGMA])
    if len(rows := np.flatnonzero(np.isfinite(params[:, at.SOLARIZE_FROM]))):
        yield _solarize, rows, _column(params[rows, at.SOLARIZE_FROM])


def _blends(
    order: np.ndarray, value: np.ndarray, chosen: np.ndarray
) -> Iterator[tuple[Operation, np.ndarray, np.ndarray]]:
    """The first chosen blend of every sample, then the second, then the third."""
    turn = np.cumsum(chosen, axis=1)
    for k in range(1, int(turn.max(initial=0)) + 1):
        rows, place = np.nonzero(chosen & (turn == k))
        kind, factor = order[rows, place], value[rows, place]
        coefficients = np.zeros((len(rows), 3), np.float32)
        coefficients[:, 0] = factor
        coefficients[:, 1] = np.where(kind == PhotometryLayout.SATURATION, 1 - factor, 0)
        coefficients[:, 2] = np.where(kind == PhotometryLayout.CONTRAST, 1 - factor, 0)
        yield _blend, rows, coefficients


def _column(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, None], 3, axis=1)


# Each operation takes images (n, 3, H, W), which it may modify, and coefficients (n, 3, 1, 1).


def _luma(images: Tensor) -> Tensor:
    """ITU-R 601 luma with torchvision's coefficients, ``(n, 1, H, W)``."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(images: Tensor, coefficients: Tensor) -> Tensor:
    """Each image times its factor, plus multiples of its luma and of the luma's mean."""
    factor, of_luma, of_mean = coefficients.split(1, dim=1)
    luma = _luma(images)
    mean = luma.mean(dim=(2, 3), keepdim=True)
    return images.mul_(factor).add_(luma.mul_(of_luma).add_(mean * of_mean)).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue at constant HSV saturation and value, without converting to HSV and back.

    With the hue in sixths of a turn (red 0, green 2, blue 4) a channel is
    ``max - (max - min) * clamp(distance of the hue from the channel's own - 1, 0, 1)``.
    """
    red, green, blue = images.split(1, dim=1)  # views: each (n, 1, H, W)
    high = torch.maximum(torch.maximum(red, green), blue)
    spread = high - torch.minimum(torch.minimum(red, green), blue)
    # A grey pixel has no hue: all differences are 0, and zero spread leaves it unchanged.
    scale = spread.clamp_min(torch.finfo(spread.dtype).tiny).reciprocal_()
    from_red = (green - blue).mul_(scale)
    from_green = (blue - red).mul_(scale).add_(2)
    from_blue = (red - green).mul_(scale).add_(4)
    hue = torch.where(green == high, from_green, from_blue)
    hue = torch.where(red == high, from_red, hue).add_(shift[:, :1])
    hue.sub_((hue / 6).floor_().mul_(6))  # [0, 6)
    # The distance from red goes around the circle: 3 - |hue - 3|.
    center, sign, offset = _hue_constants(images.device)
    weight = (hue - center).abs_().mul_(sign).add_(offset).clamp_(0, 1)  # (n, 3, H, W)
    return torch.sub(high, weight.mul_(spread))


@functools.cache
def _hue_constants(device: torch.device) -> tuple[Tensor, ...]:
    """A channel's weight is ``clamp(|hue - center| * sign + offset, 0, 1)``: three (3, 1, 1)."""
    constants = torch.tensor([[3.0, 2.0, 4.0], [-1.0, 1.0, 1.0], [2.0, -1.0, -1.0]])
    return to_device(constants[:, :, None, None], device).unbind()


def _gray(images: Tensor, _: Tensor) -> Tensor:
    return _luma(images).expand_as(images)


def _blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian blur with reflected borders; each kernel is truncated at its 3 sigma.

    ``radius`` is that of the group's widest kernel: 6, or 13 taps, at sigma 2. (The ``radius`` of
    Pillow's ``GaussianBlur``, which the papers' code calls, is the sigma here.) Adding up the taps
    is three times faster on a CPU than a convolution with one group per sample. The radius is
    at most the image's shorter side minus 1, beyond which there is no reflection.
    """
    radius = min(radius, min(images.shape[2:]) - 1)
    sigma = sigma[:, :1]  # (n, 1, 1, 1)
    taps = torch.arange(radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)  # (n, 1, 1, radius + 1): centre and one half
    kernel *= taps <= torch.ceil(3 * sigma)
    kernel /= 2 * kernel.sum(dim=3, keepdim=True) - kernel[..., :1]
    out = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    for dim in (2, 3):
        size = images.shape[dim]
        source = out
        out = source.narrow(dim, radius, size) * kernel[..., :1]
        for tap in range(1, radius + 1):
            pair = source.narrow(dim, radius - tap, size) + source.narrow(dim, radius + tap, size)
            out.addcmul_(pair, kernel[..., tap : tap + 1])
    return out.clamp_(0, 1)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= threshold, 1 - images, images)
