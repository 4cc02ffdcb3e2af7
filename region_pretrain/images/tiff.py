"""TIFF files of 16 bits or many bands, which neither Pillow nor OpenCV reads completely.

Both read grey images. A directory that describes the bands of a file as one grey image is appended
to its bytes: neighbouring bands of a pixel become neighbouring pixels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from region_pretrain.images.headers import Header
from region_pretrain.images.pillow import open_with_pillow, valid_orientation
from region_pretrain.images.reading import Reading

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _BANDS, _ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 317, 322, 323, 324, 325
_EXTRA, _FORMAT = 338, 339
_TAGS = (_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, _ORIENTATION)
_TAGS += (_BANDS, _ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES)
_TAGS += (_TILE_BYTES, _EXTRA, _FORMAT)
_CHUNKS = {_STRIPS, _STRIP_BYTES}, {_TILES, _TILE_BYTES}

_BYTEWISE = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, LZMA, Zstandard
_PREDICTED = (5, 8, 32946, 34925, 50000)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_ALPHA = (1, 2)  # associated (premultiplied), unassociated


class Tiff(NamedTuple):
    """The first image of a TIFF file.

    Attributes:
        header: its size, orientation and bands.
        by_band: whether :func:`decode_bands` decodes it, because Pillow cannot.
        no_range: whether the pixels are floating-point numbers or have more than 16 bits.
        premultiplied: whether the colours are already multiplied by the alpha channel.
        inverted: whether 0 is white.
        tags: tag -> values.
    """

    header: Header
    by_band: bool
    no_range: bool
    premultiplied: bool
    inverted: bool
    tags: dict[int, tuple]


def read_tiff(data: bytes) -> Tiff | None:
    """The directory of a TIFF; None for other files, and where it is damaged or cut."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        directory = ImageFileDirectory_v2(data[: 16 if b"+" in data[:4] else 8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        tags = {tag: directory[tag] for tag in _TAGS if tag in directory}
        tags = {t: v if isinstance(v, tuple) else (v,) for t, v in tags.items()}
        (width,), (height,) = tags[_WIDTH], tags[_HEIGHT]
        (bands,) = tags.get(_BANDS, (1,))
        photometric = tags.get(_PHOTOMETRIC, (None,))[0]
    except Exception:  # Pillow raises all kinds of exceptions on damaged bytes
        return None
    if not any(chunks <= tags.keys() for chunks in _CHUNKS):
        return None
    extra = tags.get(_EXTRA, ())
    simple = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)
    if simple:
        alpha = len(extra) == 1 and extra[0] in _ALPHA
    else:  # a palette, CMYK or YCbCr, which Pillow converts to RGB
        alpha, bands = False, 3
    bits = set(tags.get(_BITS, (1,)))
    ordinary = bits == {8} and bands - alpha in (1, 3)
    formats = set(tags.get(_FORMAT, (1,)))
    by_band = (
        simple
        and not ordinary
        and bits in ({8}, {16})
        and formats == {1}
        and tags.get(_COMPRESSION, (1,))[0] in _BYTEWISE
    )
    orientation = valid_orientation(tags.get(_ORIENTATION, (1,))[0])
    return Tiff(
        Header(width, height, orientation, "TIFF", max(bits), bands, alpha),
        by_band,
        no_range=3 in formats or max(bits) > 16,
        premultiplied=alpha and extra[0] == 1,
        inverted=photometric == _WHITE_IS_ZERO,
        tags=tags,
    )


def decode_bands(data: bytes, tiff: Tiff, reading: Reading, name: str) -> np.ndarray:
    """Decode a TIFF whose ``by_band`` is true.

    Args:
        data: content of the file.
        tiff: its directory.
        reading: which bits and bands are shown.
        name: the file's name in error messages.

    Returns:
        ``(H, W, 3)`` uint8 RGB as stored, before its orientation is applied.

    Raises:
        Exception: of any kind that Pillow raises for damaged bytes.
    """
    chosen = [band - 1 for band in reading.bands or range(1, tiff.header.bands + 1)]
    planar = tiff.tags.get(_PLANAR, (1,))[0] == 2
    values = _read_planes(data, tiff, chosen, name) if planar else _read_pixels(data, tiff, name)
    if not planar:
        values = values[..., chosen]
    largest = np.iinfo(values.dtype).max
    if tiff.inverted and 0 in chosen:
        full = largest if reading.bits is None or largest == 255 else (1 << reading.bits) - 1
        grey = values[..., chosen.index(0)]
        values[..., [band == 0 for band in chosen]] = (full - np.minimum(grey, full))[..., None]
    alpha = tiff.header.alpha and reading.bands is None
    if alpha and tiff.premultiplied:
        opacity = np.maximum(values[..., -1:], 1) / largest
        values[..., :-1] = np.minimum(np.rint(values[..., :-1] / opacity), largest)
    return Reading(reading.bits).to_rgb(values, alpha, name)


def _described(tiff: Tiff, width: int, tile_width: int) -> dict[int, tuple]:
    """Tags of a grey image with the same compression, without its strips or tiles."""
    kept = (_HEIGHT, _COMPRESSION, _FILL_ORDER, _ROWS, _TILE_HEIGHT)
    tags = {tag: tiff.tags[tag] for tag in kept if tag in tiff.tags}
    tags |= {_WIDTH: (width,), _BITS: tiff.tags[_BITS][:1], _BANDS: (1,)}
    tags[_PHOTOMETRIC] = (_BLACK_IS_ZERO,)
    if _TILES in tiff.tags:
        tags[_TILE_WIDTH] = (tile_width,)
    return tags


def _chunks(tiff: Tiff) -> dict[int, tuple]:
    """The tags that locate the strips or tiles."""
    tags = (_TILES, _TILE_BYTES) if _TILES in tiff.tags else (_STRIPS, _STRIP_BYTES)
    return {tag: tiff.tags[tag] for tag in tags}


def _read_planes(data: bytes, tiff: Tiff, chosen: Sequence[int], name: str) -> np.ndarray:
    """``(H, W, len(chosen))`` of a file that stores one band after the other."""
    header, chunks = tiff.header, _chunks(tiff)
    tags = _described(tiff, header.width, tiff.tags.get(_TILE_WIDTH, (0,))[0])
    tags[_PREDICTOR] = tiff.tags.get(_PREDICTOR, (1,))
    planes = []
    for band in chosen:
        own = {}
        for tag, values in chunks.items():
            count = len(values) // header.bands
            own[tag] = values[band * count : (band + 1) * count]
        planes.append(_decode_grey(data, tags | own, name))
    return np.stack(planes, axis=2)


def _read_pixels(data: bytes, tiff: Tiff, name: str) -> np.ndarray:
    """``(H, W, N)`` of a file that stores all bands of a pixel together."""
    width, height, bands = tiff.header.width, tiff.header.height, tiff.header.bands
    (tile,) = tiff.tags.get(_TILE_WIDTH, (width,))
    tags = _described(tiff, width * bands, tile * bands) | _chunks(tiff)
    values = _decode_grey(data, tags, name).reshape(height, width, bands)
    if tiff.tags.get(_PREDICTOR, (1,))[0] == 2 and tiff.tags[_COMPRESSION][0] in _PREDICTED:
        # Each value is the difference from the same band of its left neighbour in the tile.
        parts = [values[:, x : x + tile] for x in range(0, width, tile)]
        parts = [np.cumsum(part, axis=1, dtype=values.dtype) for part in parts]
        values = np.concatenate(parts, axis=1)
    return values


def _decode_grey(data: bytes, tags: dict[int, tuple[int, ...]], name: str) -> np.ndarray:
    """Decode a file as ``(H, W)`` pixels that these tags describe."""
    order = "<" if data[:2] == b"II" else ">"
    start = len(data) + len(data) % 2
    after = start + 2 + 12 * len(tags) + 4
    entries, arrays = [struct.pack(f"{order}H", len(tags))], []
    for tag in sorted(tags):
        values = struct.pack(f"{order}{len(tags[tag])}I", *tags[tag])
        if len(values) > 4:
            arrays.append(values)
            values = struct.pack(f"{order}I", after)
            after += len(arrays[-1])
        entries.append(struct.pack(f"{order}HHI", tag, 4, len(tags[tag])) + values)
    head = data[:2] + struct.pack(f"{order}HI", 42, start)
    end = struct.pack(f"{order}I", 0)
    parts = (head, data[8:], bytes(start - len(data)), *entries, end, *arrays)
    with open_with_pillow(b"".join(parts), name, check=False) as image:
        values = np.asarray(image)
    return values.astype(values.dtype.newbyteorder("="))
