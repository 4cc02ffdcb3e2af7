"""Opens and converts images with Pillow."""

from __future__ import annotations

import io
import threading

import numpy as np
from PIL import Image

from region_pretrain.images.reading import check_pixels

NO_RANGE = (
    "floating-point pixels and integers above 16 bits have no standard range: convert to 8 bits or "
    "to unsigned 16 bits"
)

EXIF_ORIENTATION = 0x0112
_lock = threading.Lock()


def open_with_pillow(data: bytes, name: str, check: bool = True) -> Image.Image:
    """Read an image's header; the caller closes the image.

    Args:
        data: content of a file.
        name: its name in error messages.
        check: refuse images above the limit of :func:`~region_pretrain.images.reading.check_pixels`
            instead of Pillow's own limit.
    """
    with _lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if check:
        check_pixels(*image.size, name)
    return image


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an open image, from 1 to 8, also if only its XMP states it."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not affect the pixels
        return 1
    return valid_orientation(value)


def valid_orientation(value: object) -> int:
    """An EXIF orientation from 1 to 8; 1 for anything else."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def layout_of(image: Image.Image) -> tuple[int, int, bool]:
    """What :func:`bands_of` makes of an open image: bits, number of bands, alpha."""
    if image.mode[0] in "IF":
        return 16 if image.mode[0] == "I" else 32, 1, False
    alpha = image.has_transparency_data
    return 8, (1 if image.mode in ("1", "L", "LA") else 3) + alpha, alpha


def bands_of(image: Image.Image) -> tuple[np.ndarray, bool]:
    """The bands of a loaded image, and whether the last one is an alpha channel.

    Returns:
        ``(H, W, N)`` uint8 or uint16: grey, RGB, or either with alpha. A palette, CMYK and the like
        become RGB.

    Raises:
        ValueError: the pixels are not 8 or 16 bits.
    """
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(NO_RANGE)
        return values.astype(np.uint16)[..., None], False
    _, count, alpha = layout_of(image)
    image = image.convert(("L", "LA", "RGB", "RGBA")[count - 1])
    values = np.array(image)
    return values.reshape(*values.shape[:2], -1), alpha
