"""Image files before they are decoded."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.files import printable
from region_pretrain.images.decoding import decode, is_jpeg, other_header
from region_pretrain.images.headers import Header, read_header
from region_pretrain.images.opening import read_bytes
from region_pretrain.images.reading import Reading, check_pixels


@dataclass
class EncodedImage:
    """The undecoded bytes of an image file.

    Attributes:
        data: content of the file.
        name: the file's name in error messages.
        crop: ``(x0, y0, x1, y1)`` in whole pixels; if set, the image is this crop of the file.
        reading: which bits and bands are shown.
    """

    data: bytes
    name: str
    crop: tuple[int, int, int, int] | None = None
    reading: Reading = Reading()

    @classmethod
    def read(
        cls,
        path: str,
        crop: tuple[int, int, int, int] | None = None,
        reading: Mapping[str, Any] | None = None,
    ) -> EncodedImage:
        """Read a file or any URI that PathManager opens.

        Args:
            path: the file.
            crop: see :class:`EncodedImage`.
            reading: ``reading`` of its record, see :class:`Reading`.

        Raises:
            UnreadableImage: the file is missing or cannot be read.
            UserError: the file system fails, or the reading options are invalid.
        """
        name = printable(os.fspath(path))
        return cls(read_bytes(path, name), name, crop, Reading.of(reading))

    @functools.cached_property
    def _header(self) -> Header | None:
        return read_header(self.data)

    @functools.cached_property
    def header(self) -> Header:
        """What the file's header states.

        Raises:
            UnreadableImage: the header is damaged or is not an image's, or the image is too large.
        """
        header = self._header or other_header(self.data, self.name)
        check_pixels(header.width, header.height, self.name)
        return header

    def reduction(self, largest: int) -> int:
        """The factor of at most ``largest`` (1, 2, 4 or 8) at which decoding saves time.

        The pixels at the edges that a side does not fill must be at the right and at the bottom,
        also after an image has been turned upright.
        """
        if self.crop is not None or not is_jpeg(self.data):
            return 1
        while self.header.orientation != 1 and (
            self.header.width % largest or self.header.height % largest
        ):
            largest //= 2
        return largest

    def size(self) -> tuple[int, int]:
        """``(width, height)`` of the upright image in pixels, read from its header.

        Raises:
            UnreadableImage: the header is damaged or is not an image's, or the image is too large.
        """
        if self.crop is not None:
            return self.crop[2] - self.crop[0], self.crop[3] - self.crop[1]
        size = self.header.width, self.header.height
        return size[::-1] if self.header.orientation >= 5 else size

    def check(self) -> None:
        """Find out whether the image can be decoded, without decoding an ordinary JPEG or PNG.

        Raises:
            UnreadableImage: the file is truncated, too large, damaged or not an image, or its bands
                do not suit the reading options.
        """
        header = self._header
        if header is None or not (header.ordinary or header.deep):
            self.decode()
        else:
            check_pixels(header.width, header.height, self.name)
            self.reading.check(header.bands, header.alpha, self.name)

    def decode(self, reduce: int = 1) -> np.ndarray:
        """Decode the image.

        Args:
            reduce: 1, 2, 4 or 8; the image is downscaled by this factor, which makes decoding a
                JPEG much faster. A crop is never downscaled.

        Returns:
            ``(ceil(H / reduce), ceil(W / reduce), 3)`` uint8 RGB with the EXIF orientation applied,
            grey as three equal channels, transparency composited on white, 16 bits scaled to 8 as
            :class:`Reading` defines.

        Raises:
            UnreadableImage: the file is damaged, too large or not an image, or its bands do not
                suit the reading options.
            UserError: the crop reaches out of the image, or is empty.
        """
        if self.crop is None:
            return decode(self.data, self.name, self._header, reduce, self.reading)
        x0, y0, x1, y1 = self.crop
        pixels = decode(self.data, self.name, self._header, 1, self.reading)
        height, width = pixels.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(
                f"{self.name}: crop={self.crop} of its record is not within its {width} x {height} "
                "pixels"
            )
        return pixels[y0:y1, x0:x1]


def read_image(path: str) -> np.ndarray:
    """Read and decode an image file at full size; see :meth:`EncodedImage.decode`.

    Raises:
        UnreadableImage: the file is missing, damaged, too large or not an image.
    """
    return EncodedImage.read(path).decode()


def read_record(record: Mapping[str, Any], format: str = "RGB") -> np.ndarray:
    """Read the image of a Detectron2 record, with its ``crop`` and ``reading`` if it has them.

    Args:
        record: with ``file_name``.
        format: one of Detectron2's image formats: RGB, BGR, L or YUV-BT.601.

    Returns:
        The pixels of :meth:`EncodedImage.decode`, converted as Detectron2's ``read_image`` does:
        ``(H, W, 3)`` uint8, ``(H, W, 1)`` uint8 for L, or ``(H, W, 3)`` float64 for YUV-BT.601.

    Raises:
        UnreadableImage: the file is missing, damaged, too large or not an image.
        UserError: the reading options are invalid.
    """
    image = EncodedImage.read(record["file_name"], record.get("crop"), record.get("reading"))
    pixels = image.decode()
    return pixels if format == "RGB" else convert_PIL_to_numpy(Image.fromarray(pixels), format)


def tolerated_files(count: int, fraction: float, key: str) -> int:
    """How many image files of a data set may be unreadable.

    Args:
        count: number of its images.
        fraction: the tolerated fraction, from 0 to 1.
        key: the option or key of the fraction, for the error message.

    Returns:
        The fraction of ``count``, but at least one unless the fraction is 0.

    Raises:
        UserError: the fraction is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"{key}={fraction}: must be a fraction from 0 to 1")
    return max(1, int(fraction * count)) if fraction else 0
