"""Which 8-bit RGB pixels a file of more bits or bands is shown as."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from region_pretrain.errors import UserError

#: Environment variable: the largest image that is decoded, in pixels. Child processes inherit it.
MAX_PIXELS = "REGION_PRETRAIN_MAX_PIXELS"
_DEFAULT_MAX_PIXELS = 300_000_000


class UnreadableImage(UserError):
    """A file that is missing, damaged, too large or not an image."""


class Reading(NamedTuple):
    """A data set's reading options, ``record["reading"]``.

    Attributes:
        bits: number of significant bits of 16-bit images: ``2**bits - 1`` and larger values become
            255. None: the upper byte of the 16 bits. 8-bit images are unaffected.
        bands: the bands, counted from 1, that become red, green and blue, or one band that is shown
            as grey. None: grey or RGB, with or without alpha, which is composited on white.
    """

    bits: int | None = None
    bands: tuple[int, ...] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Reading:
        """Check the options of a record.

        Raises:
            UserError: an unknown option, or a value out of range.
        """
        if not options:
            return cls()
        unknown = set(options) - set(cls._fields)
        if unknown:
            raise UserError(f"reading option {min(unknown)}: must be one of bits and bands")
        bits, bands = options.get("bits"), options.get("bands")
        if bits is not None and bits not in range(1, 17):
            raise UserError(f"reading option bits={bits}: must be an integer from 1 to 16")
        if bands is not None:
            bands = tuple(bands)
            if len(bands) not in (1, 3) or any(band not in range(1, 1 << 16) for band in bands):
                given = ",".join(map(str, bands))
                raise UserError(
                    f"reading option bands={given}: name 1 or 3 bands, counted from 1, e.g. 4,3,2"
                )
        return cls(bits, bands)

    def check(self, count: int, alpha: bool, name: str) -> None:
        """Refuse a file whose bands do not suit these options.

        Args:
            count: number of the file's bands, including an alpha channel.
            alpha: whether the last band is an alpha channel.
            name: the file's name in error messages.

        Raises:
            UnreadableImage: a chosen band does not exist, or a choice of bands is needed.
        """
        plural = "band" if count == 1 else "bands"
        if self.bands is not None:
            if max(self.bands) > count:
                given = ",".join(map(str, self.bands))
                raise UnreadableImage(
                    f"{name} has {count} {plural}: change &bands={given} in the data set's name"
                )
        elif count - alpha not in (1, 3):
            raise UnreadableImage(
                f"{name} has {count} {plural}: choose 1 or 3 of them in the data set's name, e.g. "
                "folder://DIR?bands=3,2,1 or coco://ANN.json?images=DIR&bands=3,2,1"
            )

    def to_rgb(self, values: np.ndarray, alpha: bool, name: str) -> np.ndarray:
        """Show the bands of an image as RGB.

        Args:
            values: ``(H, W, N)`` uint8 or uint16.
            alpha: whether the last band is an alpha channel.
            name: the file's name in error messages.

        Returns:
            ``(H, W, 3)`` uint8.

        Raises:
            UnreadableImage: see :meth:`check`.
        """
        self.check(values.shape[2], alpha, name)
        if self.bands is not None:
            values, alpha = values[..., [band - 1 for band in self.bands]], False
        colours = values[..., :-1] if alpha else values
        if colours.dtype == np.uint16:
            colours = _to_8_bits(self.bits)[colours]
        if colours.shape[2] == 1:
            colours = np.repeat(colours, 3, axis=2)
        if alpha:
            opacity = values[..., -1:]
            colours = _on_white(colours, opacity >> 8 if opacity.dtype == np.uint16 else opacity)
        return colours


@functools.cache
def _to_8_bits(bits: int | None) -> np.ndarray:
    """``(65536,)`` uint8: the 8-bit value of each 16-bit value."""
    values = np.arange(1 << 16)
    if bits is None:
        return (values >> 8).astype(np.uint8)
    full = (1 << bits) - 1
    return np.rint(np.minimum(values, full) * 255 / full).astype(np.uint8)


def _on_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Composite ``(H, W, 3)`` with opacity ``(H, W, 1)`` on white, rounded to the nearest value."""
    opacity = opacity.astype(np.uint16)
    return ((colours * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def readings_of(records: Iterable[Mapping[str, Any]]) -> str:
    """The reading options of records, e.g. ``"bits=12&bands=4,3,2"``, joined by ``|``."""
    options = (record.get("reading") for record in records)
    found = set()
    for reading in {repr(some): Reading.of(some) for some in options}.values():
        bits = [f"bits={reading.bits}"] if reading.bits is not None else []
        bands = [f"bands={','.join(map(str, reading.bands))}"] if reading.bands is not None else []
        found.add("&".join(bits + bands))
    return "|".join(sorted(found))


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse an image that is too large to decode.

    Args:
        width, height: its size in pixels, from its header.
        name: the file's name in error messages.

    Raises:
        UnreadableImage: it has more pixels than the environment variable :data:`MAX_PIXELS` allows.
        UserError: that variable is not a number.
    """
    text = os.environ.get(MAX_PIXELS, str(_DEFAULT_MAX_PIXELS))
    try:
        limit = int(float(text))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{MAX_PIXELS}={text}: must be a number of pixels, e.g. 1e9") from error
    if width * height > limit:
        raise UnreadableImage(
            f"{name} has {width}x{height} pixels, more than the limit of {limit}: to read it, set "
            f"the environment variable {MAX_PIXELS}={width * height}"
        )


def size_mismatch(name: str, found: tuple[int, int], declared: tuple[int, int]) -> UserError:
    """The error for an image whose size contradicts its record.

    Args:
        name: the image file.
        found: ``(width, height)`` of the upright image.
        declared: ``(width, height)`` in its record.
    """
    advice = "correct its width and height in the annotations, or restore the annotated image"
    if found == declared[::-1] and found != declared:
        advice = (
            "the annotations ignore its EXIF orientation; annotate the upright image, or, if the "
            "boxes fit the image as stored, remove the orientation from the file"
        )
    return UserError(
        "{} is {}x{}, but its annotations are for {}x{}: {}".format(name, *found, *declared, advice)
    )
