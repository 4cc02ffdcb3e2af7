"""Headers of JPEG, PNG and TIFF files, read without decoding."""

from __future__ import annotations

import struct
from typing import NamedTuple

from PIL import Image

from region_pretrain.images.pillow import (
    EXIF_ORIENTATION,
    open_with_pillow,
    orientation_of,
    valid_orientation,
)

_EXIF = b"Exif\0\0"


class Header(NamedTuple):
    """What the header of a file states.

    Attributes:
        width, height: as stored, before the EXIF orientation is applied.
        orientation: EXIF orientation, 1 to 8.
        format: name of the format, as Pillow's.
        bits: largest number of bits of a band.
        bands: number of bands, including an alpha channel; a palette has 3.
        alpha: whether the last band is an alpha channel.
        ordinary: 8 bits, grey or RGB, no transparency and not truncated, which OpenCV reads
            correctly.
        deep: 16 bits and not truncated, of which OpenCV reads the colours correctly.
        key: the colour that is transparent in a deep file, one value per band; counted as a band of
            alpha.
    """

    width: int
    height: int
    orientation: int
    format: str
    bits: int
    bands: int
    alpha: bool = False
    ordinary: bool = False
    deep: bool = False
    key: tuple[int, ...] | None = None


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG or PNG; None for other formats and truncated headers."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg_header(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png_header(data)
    except (struct.error, IndexError):
        pass
    return None


def _jpeg_header(data: bytes) -> Header | None:
    position, exif, xmp, frame = 2, b"", False, None
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
        elif marker == 0xE1 and data.startswith(_EXIF, position + 4):
            exif += data[position + 4 + len(_EXIF) : position + 2 + length]
        elif marker == 0xE1 and not xmp:
            xmp = data.find(b"tiff:Orientation", position, position + length) >= 0
        position += 2 + length
    if frame is None:
        return None
    bits, height, width, channels = frame
    if width == 0 or height == 0:
        return None
    complete = data.rfind(b"\xff\xd9", position) >= 0
    ordinary = bits == 8 and channels in (1, 3) and complete
    orientation = _orientation(exif, data if xmp else b"")
    bands = 1 if channels == 1 else 3
    return Header(width, height, orientation, "JPEG", bits, bands, ordinary=ordinary)


def _png_header(data: bytes) -> Header | None:
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if data[12:16] != b"IHDR" or width == 0 or height == 0:
        return None
    # OpenCV reads grey, RGB and palette correctly; Pillow handles transparency and animation.
    simple, exif, elsewhere, complete = colour in (0, 2, 3), b"", False, False
    animated, key = False, None
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in (b"tRNS", b"acTL"):
            simple, animated = False, animated or kind == b"acTL"
            if kind == b"tRNS" and bits == 16 and length == {0: 2, 2: 6}.get(colour):
                key = struct.unpack_from(f">{length // 2}H", data, position + 8)
        elif kind == b"eXIf":
            exif = data[position + 8 : position + 8 + length]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            elsewhere |= data.startswith((b"Raw profile type ", b"XML:com.adobe.xmp"), position + 8)
        elif kind == b"IEND":
            complete = True
            break
        position += length + 12
    alpha = colour in (4, 6) or key is not None
    orientation = _orientation(exif, data if elsewhere else b"")
    return Header(
        width,
        height,
        orientation,
        "PNG",
        bits,
        bands=(1 if colour in (0, 4) else 3) + alpha,
        alpha=alpha,
        ordinary=bits == 8 and simple and complete,
        deep=bits == 16 and (simple or alpha) and complete and not animated,
        key=key,
    )


def _orientation(exif: bytes, data: bytes) -> int:
    """The orientation, 1 to 8, as Pillow and thus Detectron2 find it.

    Args:
        exif: the EXIF block, without its prefix.
        data: the file, if it may state an orientation elsewhere, e.g. in XMP.
    """
    block = Image.Exif()
    try:
        block.load(_EXIF + exif)
    except Exception:  # damaged EXIF does not affect the pixels
        block = {}
    if EXIF_ORIENTATION not in block and data:
        try:
            with open_with_pillow(data, "", check=False) as image:
                return orientation_of(image)
        except Exception:  # its decoder reports what is wrong
            return 1
    return valid_orientation(block.get(EXIF_ORIENTATION, 1))
