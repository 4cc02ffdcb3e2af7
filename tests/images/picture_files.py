"""Image files that the tests of decoding share."""

import struct
import zlib

import numpy as np
from PIL import Image


def smooth(width: int = 37, height: int = 23) -> np.ndarray:
    """Smooth, so that JPEG keeps it, and without any symmetry."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return (np.stack([x * 255, y * 255, (1 - x) * y * 255], -1)).astype(np.uint8)


def save(path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(width: int, height: int, bits: int, colour: int, rows: bytes, chunks=()) -> bytes:
    """A PNG built by hand, for kinds that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    middle = b"".join(chunk(*c) for c in chunks)
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + middle + body + chunk(b"IEND", b"")
