"""Reads image files as a viewer shows them: 8-bit RGB, upright, transparency on white."""

from __future__ import annotations

import functools
import io
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from region_pretrain.errors import UserError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform; OpenCV decodes to the same pixels
    simplejpeg = None

_EXIF_ORIENTATION = 0x0112
_JPEG_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class UnreadableImage(UserError):
    """A file that is missing, damaged or not an image."""


class _Header(NamedTuple):
    """The header of a JPEG or PNG.

    Attributes:
        width, height: as stored, before the EXIF orientation is applied.
        orientation: EXIF orientation, 1 to 8.
        ordinary: 8 bits, grey or RGB, no transparency and not truncated, which OpenCV reads
            correctly.
    """

    width: int
    height: int
    orientation: int
    ordinary: bool


@dataclass
class EncodedImage:
    """The undecoded bytes of an image file.

    Attributes:
        data: content of the file.
        name: the file's name in error messages.
        crop: ``(x0, y0, x1, y1)`` in whole pixels; if set, the image is this crop of the file.
    """

    data: bytes
    name: str
    crop: tuple[int, int, int, int] | None = None

    @classmethod
    def read(cls, path: str, crop: tuple[int, int, int, int] | None = None) -> EncodedImage:
        """Read a file or any URI that PathManager opens.

        Raises:
            UnreadableImage: the file is missing or cannot be read.
        """
        return cls(_read_bytes(path), os.fspath(path), crop)

    @functools.cached_property
    def _header(self) -> _Header | None:
        return _header(self.data)

    @property
    def reducible(self) -> bool:
        """Whether decoding at a reduced size saves time."""
        return self.crop is None and self.data.startswith(b"\xff\xd8")

    def size(self) -> tuple[int, int]:
        """``(width, height)`` of the upright image in pixels, read from its header.

        Raises:
            UnreadableImage: the header is damaged or is not an image's.
        """
        if self.crop is not None:
            return self.crop[2] - self.crop[0], self.crop[3] - self.crop[1]
        header = self._header or _header_by_pillow(self.data, self.name)
        size = header.width, header.height
        return size[::-1] if header.orientation >= 5 else size

    def decode(self, reduce: int = 1) -> np.ndarray:
        """Decode the image.

        Args:
            reduce: 1, 2, 4 or 8; the image is downscaled by this factor, which makes decoding a
                JPEG much faster. A crop is never downscaled.

        Returns:
            ``(ceil(H / reduce), ceil(W / reduce), 3)`` uint8 RGB with the EXIF orientation applied,
            grey as three equal channels, transparency composited on white, 16 bits scaled to 8.

        Raises:
            UnreadableImage: the file is damaged or not an image.
        """
        if self.crop is None:
            return _decode(self.data, self.name, self._header, reduce)
        x0, y0, x1, y1 = self.crop
        return _decode(self.data, self.name, self._header, 1)[y0:y1, x0:x1]


def read_image(path: str) -> np.ndarray:
    """Read and decode an image file at full size; see :meth:`EncodedImage.decode`.

    Raises:
        UnreadableImage: the file is missing, damaged or not an image.
    """
    return EncodedImage.read(path).decode()


def _decode(data: bytes, name: str, header: _Header | None, reduce: int) -> np.ndarray:
    if reduce not in _JPEG_REDUCED:
        raise ValueError(f"reduce={reduce}: must be 1, 2, 4 or 8")
    is_jpeg = data.startswith(b"\xff\xd8")
    pixels = None
    if header is not None and header.ordinary:
        if is_jpeg and reduce == 1:
            pixels = _decode_with_turbojpeg(data)
        if pixels is None:
            pixels = _decode_with_opencv(data, reduce if is_jpeg else 1)
    if pixels is not None:
        if is_jpeg and reduce > 1:  # reduced sizes are decoded to BGR only
            cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
            reduce = 1
        orientation = header.orientation
    else:
        pixels, orientation = _decode_with_pillow(data, name)
        orientation = header.orientation if header is not None else orientation
    if reduce > 1:
        height, width = pixels.shape[:2]
        size = (-(-width // reduce), -(-height // reduce))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(_upright(pixels, orientation))


def _header_by_pillow(data: bytes, name: str) -> _Header:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "TIFF":
                image.load()  # Pillow applies a TIFF's orientation itself, also to its size
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            return _Header(*image.size, _valid_orientation(orientation), False)
    except Exception as error:  # decoders raise all kinds of exceptions on damaged bytes
        raise _unreadable(name, data, error) from error


def _read_bytes(path: str) -> bytes:
    path = os.fspath(path)
    try:
        # A local file is read with one system call; PathManager and a buffer take twice as long.
        remote = "://" in path
        with PathManager.open(path, "rb") if remote else open(path, "rb", buffering=0) as file:
            return file.read()
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path}: no such file") from error
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read: {error}") from error


def _unreadable(name: str, data: bytes, error: Exception) -> UnreadableImage:
    if not data:
        return UnreadableImage(f"{name}: the file is empty")
    if isinstance(error, Image.UnidentifiedImageError):
        return UnreadableImage(f"{name}: not an image, or its header is damaged")
    return UnreadableImage(f"{name}: damaged, or of an unsupported kind: {error}")


def _header(data: bytes) -> _Header | None:
    """The header of a JPEG or PNG; None for other formats and truncated headers."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg_header(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png_header(data)
    except (struct.error, IndexError):
        pass
    return None


def _jpeg_header(data: bytes) -> _Header | None:
    position, orientation, frame = 2, 1, None
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:  # start of scan: the header ends here, and a later 0xFFD9 ends the file
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = struct.unpack_from(">BHHB", data, position + 4)
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 4 : position + 2 + length])
        position += 2 + length
    if frame is None:
        return None
    bits, height, width, channels = frame
    if width == 0 or height == 0:
        return None
    whole = data.rfind(b"\xff\xd9", position) >= 0
    return _Header(width, height, orientation, bits == 8 and channels in (1, 3) and whole)


def _png_header(data: bytes) -> _Header | None:
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if data[12:16] != b"IHDR" or width == 0 or height == 0:
        return None
    # OpenCV reads grey, RGB and palette correctly; Pillow handles transparency and animation.
    ordinary, orientation, whole = bits == 8 and colour in (0, 2, 3), 1, False
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in (b"tRNS", b"acTL"):
            ordinary = False
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        elif kind == b"IEND":
            whole = True
            break
        position += length + 12
    return _Header(width, height, orientation, ordinary and whole)


def _exif_orientation(block: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(block)
        return _valid_orientation(exif.get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF does not affect the pixels
        return 1


def _valid_orientation(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1 to 8 to ``(H, W, 3)``."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode_with_turbojpeg(data: bytes) -> np.ndarray | None:
    """The same pixels as OpenCV, a few per cent faster: both call libjpeg-turbo."""
    if simplejpeg is None:
        return None
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None  # OpenCV tolerates minor damage


def _decode_with_opencv(data: bytes, reduce: int) -> np.ndarray | None:
    try:
        flags = _JPEG_REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None  # Pillow reads it, or reports what is wrong


def _decode_with_pillow(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """``(H, W, 3)`` uint8 RGB as stored, and the EXIF orientation."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            orientation = _valid_orientation(image.getexif().get(_EXIF_ORIENTATION, 1))
            if image.mode[0] in "IF":
                return _deep_grey(np.asarray(image)), orientation
            if image.has_transparency_data:
                image = image.convert("RGBA")
                canvas = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(canvas, image)
            return np.array(image.convert("RGB")), orientation
    except Exception as error:  # decoders raise all kinds of exceptions on damaged bytes
        raise _unreadable(name, data, error) from error


def _deep_grey(values: np.ndarray) -> np.ndarray:
    """16-bit ``(H, W)``, in any dtype that Pillow uses for it, to ``(H, W, 3)`` uint8."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("pixels above 16 bits have no standard range: convert to 8 bits")
    grey = (values >> 8).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
