"""Orientations outside of one EXIF block, and 16-bit files that state their number of bits."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as stock_read_image
from picture_files import oriented, png, smooth
from PIL import Image

from region_pretrain.images import read_image, read_record

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'


def _jpeg_with(*segments: bytes) -> bytes:
    """A JPEG with APP1 segments."""
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "JPEG", quality=95)
    parts = [b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments]
    return b"\xff\xd8" + b"".join(parts) + buffer.getvalue()[2:]


def _png_with(kind: bytes, text: bytes) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in smooth())
    return png(37, 23, 8, 2, rows, [(kind, text)])


def _elsewhere() -> dict[str, bytes]:
    """Files whose orientation 6 is not in one EXIF block."""
    exif = oriented(6).tobytes()  # with its prefix
    profile = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + XMP
    upright = oriented(1).tobytes()
    return {
        "two segments.jpg": _jpeg_with(exif[:20], b"Exif\0\0" + exif[20:]),
        "xmp.jpg": _jpeg_with(xmp),
        "exif before xmp.jpg": _jpeg_with(xmp, upright),
        "profile.png": _png_with(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        "xmp.png": _png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        "other text.png": _png_with(b"tEXt", b"Title\0Raw profile type exif"),
        "damaged profile.png": _png_with(b"zTXt", b"Raw profile type exif\0\0junk"),
    }


@pytest.mark.parametrize("name", _elsewhere())
def test_orientations_are_found_where_detectron2_finds_them(tmp_path, check_size, name):
    path = tmp_path / name
    path.write_bytes(_elsewhere()[name])
    image = read_image(str(path))
    turned = not name.startswith(("exif before", "other", "damaged"))
    assert image.shape == ((37, 23, 3) if turned else (23, 37, 3))
    expected = stock_read_image(str(path), "RGB").astype(int)
    assert image.shape == expected.shape and np.abs(image - expected).max() <= 3
    check_size(str(path), image)


def _deep_files(values: np.ndarray) -> dict[str, bytes]:
    """12-bit values in formats that state the number of bits; Pillow scales them."""
    height, width = values.shape
    head = b"%d %d\n4095\n" % (width, height)
    rgb = np.stack([values, values // 2, values // 4], -1)
    text = b"".join(b"%d\n" % value for value in values.ravel())
    return {
        "grey.pgm": b"P5\n" + head + values.astype(">u2").tobytes(),
        "text.pnm": b"P2\n" + head + text,
        "rgb.ppm": b"P6\n" + head + rgb.astype(">u2").tobytes(),
        "grey.jp2": cv2.imencode(".jp2", values.astype(np.uint16))[1].tobytes(),
        "rgb.jp2": cv2.imencode(".jp2", rgb[..., ::-1].astype(np.uint16))[1].tobytes(),
    }


@pytest.mark.parametrize("name", _deep_files(np.zeros((64, 64), int)))
def test_bits_of_pnm_and_jpeg_2000(tmp_path, name):
    values = np.arange(64 * 64).reshape(64, 64)
    path = tmp_path / name
    path.write_bytes(_deep_files(values)[name])
    shown = [values, values // 2, values // 4] if "rgb" in name else [values] * 3
    shown = np.stack(shown, -1)
    record = {"file_name": str(path), "reading": {"bits": 12}}
    image = read_record(record)
    lossy = 1 if name.endswith("jp2") else 0  # OpenCV's encoder
    assert np.abs(image - np.rint(shown * 255 / 4095)).max() <= lossy
    ten = read_record({**record, "reading": {"bits": 10}})
    assert np.abs(ten - np.rint(np.minimum(shown, 1023) * 255 / 1023)).max() <= lossy
