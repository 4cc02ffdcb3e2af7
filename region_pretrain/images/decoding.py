"""Decodes image files to 8-bit RGB."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.images.headers import Header
from region_pretrain.images.pillow import (
    NO_RANGE,
    bands_of,
    layout_of,
    open_with_pillow,
    orientation_of,
)
from region_pretrain.images.reading import Reading, UnreadableImage, check_pixels
from region_pretrain.images.tiff import decode_bands, read_tiff

try:
    import simplejpeg
except ImportError:  # no wheel for this platform; OpenCV decodes to the same pixels
    simplejpeg = None

_JPEG_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


#: How PNM and JPEG 2000 files begin. Pillow scales their values to the full 8 or 16 bits.
_SCALED_BY_PILLOW = (b"P2", b"P3", b"P5", b"P6", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")


def is_jpeg(data: bytes) -> bool:
    """Whether a file is a JPEG, which is decoded faster at a reduced size."""
    return data.startswith(b"\xff\xd8")


def other_header(data: bytes, name: str) -> Header:
    """The header of a file for which :func:`~region_pretrain.images.headers.read_header` has none.

    Args:
        data: content of a file.
        name: its name in error messages.

    Raises:
        UnreadableImage: the header is damaged or is not an image's, or the image is too large.
    """
    if (tiff := read_tiff(data)) is not None:
        return tiff.header
    try:
        with open_with_pillow(data, name) as image:
            orientation = orientation_of(image)
            return Header(*image.size, orientation, image.format, *layout_of(image))
    except Exception as error:  # decoders raise all kinds of exceptions on damaged bytes
        raise _unreadable(name, data, error) from error


def decode(
    data: bytes, name: str, header: Header | None, reduce: int, reading: Reading
) -> np.ndarray:
    """Decode a file; see :meth:`region_pretrain.images.EncodedImage.decode`.

    Args:
        data: content of the file.
        name: its name in error messages.
        header: its :func:`~region_pretrain.images.headers.read_header`.
        reduce: 1, 2, 4 or 8.
        reading: which bits and bands are shown.
    """
    if reduce not in _JPEG_REDUCED:
        raise ValueError(f"reduce={reduce}: must be 1, 2, 4 or 8")
    pixels = None
    if header is not None:
        check_pixels(header.width, header.height, name)
        if header.ordinary or header.deep:
            reading.check(header.bands, header.alpha, name)
        pixels = _decode_ordinary(data, header, reduce, reading)
        if pixels is None and header.deep:
            pixels = _decode_deep_png(data, header, reading, name)
    if pixels is not None:
        orientation = header.orientation
        if is_jpeg(data):
            reduce = 1
    else:
        pixels, orientation = _decode_other(data, name, reading)
        orientation = header.orientation if header is not None else orientation
    if reduce > 1:
        height, width = pixels.shape[:2]
        size = (-(-width // reduce), -(-height // reduce))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(_upright(pixels, orientation))


def _unreadable(name: str, data: bytes, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if not data:
        return UnreadableImage(f"{name}: the file is empty")
    if isinstance(error, Image.UnidentifiedImageError) and read_tiff(data) is not None:
        return UnreadableImage(
            f"{name}: a TIFF of an unsupported kind: convert to 8 bits or to unsigned 16 bits"
        )
    if isinstance(error, Image.UnidentifiedImageError):
        return UnreadableImage(f"{name}: not an image, or its header is damaged")
    reason = " ".join(str(error).split())
    return UnreadableImage(f"{name}: damaged, or of an unsupported kind: {reason}")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1 to 8 to ``(H, W, 3)``."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode_ordinary(
    data: bytes, header: Header, reduce: int, reading: Reading
) -> np.ndarray | None:
    """``(H, W, 3)`` uint8 RGB of 8-bit grey or RGB; a JPEG is reduced, other files are not."""
    if not header.ordinary:
        return None
    jpeg, pixels = is_jpeg(data), None
    if jpeg and reduce == 1:
        pixels = _decode_with_turbojpeg(data)
    if pixels is None:
        pixels = _decode_with_opencv(data, _JPEG_REDUCED[reduce if jpeg else 1])
    if pixels is None:
        return None
    if jpeg and reduce > 1:  # reduced sizes are decoded to BGR only
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    if reading.bands is not None:
        pixels = pixels[..., [band - 1 for band in (reading.bands * 3)[:3]]]
    return pixels


def _decode_deep_png(data: bytes, header: Header, reading: Reading, name: str) -> np.ndarray | None:
    values = _decode_with_opencv(data, cv2.IMREAD_UNCHANGED)
    if values is None:
        return None
    if header.key is None:
        return reading.to_rgb(_in_rgb_order(values, header.bands), header.alpha, name)
    colours = _in_rgb_order(values, 3)[..., : len(header.key)]  # OpenCV may return alpha or not
    opaque = (colours != np.array(header.key, np.uint16)).any(axis=2, keepdims=True)
    values = np.concatenate([colours, opaque * np.uint16(65535)], axis=2)
    return reading.to_rgb(values, header.alpha, name)


def _in_rgb_order(values: np.ndarray, bands: int) -> np.ndarray:
    """``(H, W, N)`` from OpenCV's grey, BGR or BGRA; grey with alpha has three equal colours."""
    if values.ndim == 2:
        return values[..., None]
    return values[..., [2, 3] if bands == 2 else [2, 1, 0, 3][:bands]]


def _decode_with_turbojpeg(data: bytes) -> np.ndarray | None:
    """The same pixels as OpenCV, a few per cent faster: both call libjpeg-turbo."""
    if simplejpeg is None:
        return None
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None  # OpenCV tolerates minor damage


def _decode_with_opencv(data: bytes, flags: int) -> np.ndarray | None:
    try:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None  # Pillow reads it, or reports what is wrong


def _decode_other(data: bytes, name: str, reading: Reading) -> tuple[np.ndarray, int]:
    """``(H, W, 3)`` uint8 RGB as stored, and the EXIF orientation."""
    try:
        tiff = read_tiff(data)
        if tiff is not None:
            header = tiff.header
            check_pixels(header.width, header.height, name)
            if tiff.no_range:
                raise ValueError(NO_RANGE)
            reading.check(header.bands, header.alpha, name)
            if tiff.by_band:
                return decode_bands(data, tiff, reading, name), header.orientation
        with open_with_pillow(data, name) as image:
            image.load()  # applies the orientation of a TIFF
            orientation = orientation_of(image)
            bands, alpha = bands_of(image)
        if reading.bits is not None and data.startswith(_SCALED_BY_PILLOW):
            deep = _decode_with_opencv(data, cv2.IMREAD_UNCHANGED)
            if deep is not None and deep.dtype == np.uint16:
                bands, alpha = _in_rgb_order(deep, bands.shape[2]), alpha and deep.ndim == 3
        return reading.to_rgb(bands, alpha, name), orientation
    except Exception as error:  # decoders raise all kinds of exceptions on damaged bytes
        raise _unreadable(name, data, error) from error
