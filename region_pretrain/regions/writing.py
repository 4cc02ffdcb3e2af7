"""Writes region stores: from rows in memory, or merged from many stores."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import cv2
import numpy as np
import pyarrow as pa

from region_pretrain import __version__
from region_pretrain.errors import UserError
from region_pretrain.files import write_atomic
from region_pretrain.regions.store import (
    CHECKSUM_KEY,
    FORMAT_VERSION,
    MANIFEST_KEY,
    SCHEMA,
    Chunk,
    RegionStore,
    checksum_of,
    content_hash,
    key_hash,
)

_CHUNK_ROWS = 1 << 14
_MERGE_CHUNKS = 16  # chunks of rows in memory during a merge

#: key, width, height, boxes ``(N, 4)`` float32
Row = tuple[str, int, int, np.ndarray]


def write_store(path: str, rows: Iterable[Row], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write a store of rows that fit into memory; the file is complete or absent.

    Args:
        path: local file; an older one is replaced.
        rows: key, width, height and boxes ``(N, 4)`` XYXY half-open of each image, in any order.
        facts: entries of the manifest, at least ``recipe``.

    Returns:
        The manifest: the facts, counts, content hash and checksums.

    Raises:
        UserError: two rows with the same key, or a box that is empty or not within its image.
    """
    rows = [(key_hash(row[0].encode()), row[0].encode(), *row[1:]) for row in rows]
    rows.sort(key=lambda row: row[:2])
    batches = [_batch(rows[i : i + _CHUNK_ROWS]) for i in range(0, len(rows), _CHUNK_ROWS)]
    return _write(path, lambda: iter(batches), facts)


def merge_stores(paths: Sequence[str], path: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge stores into one, with only a slice of them in memory at a time.

    The result does not depend on how the images were distributed over the stores.

    Args:
        paths: the stores to merge.
        path: local file of the result; an older one is replaced.
        facts: entries of the manifest, at least ``recipe``.

    Returns:
        The manifest.

    Raises:
        UserError: an image is in two stores, or a store is missing or damaged.
    """
    total = 0
    for p in paths:  # one at a time: there may be more stores than file handles
        store = RegionStore.open(p)
        store.verify()
        total += len(store)
    slices = -(-total // (_MERGE_CHUNKS * _CHUNK_ROWS))
    # Hashes are uniform, so equal ranges of them contain about equally many rows.
    bounds = [(i << 64) // slices for i in range(1, slices)] if slices else []

    def batches() -> Iterator[pa.RecordBatch]:
        for low, high in zip([0, *bounds], [*bounds, None], strict=True):
            rows = []
            for p in paths:  # reopened per slice
                for chunk in RegionStore.open(p).chunks:
                    start = int(chunk.hashes.searchsorted(np.uint64(low)))
                    stop = len(chunk.hashes)
                    if high is not None:
                        stop = int(chunk.hashes.searchsorted(np.uint64(high)))
                    for i in range(start, stop):
                        size = int(chunk.widths[i]), int(chunk.heights[i])
                        row = (int(chunk.hashes[i]), chunk.key(i), *size, chunk.boxes_of(i).copy())
                        rows.append(row)
            rows.sort(key=lambda row: row[:2])
            for i in range(0, len(rows), _CHUNK_ROWS):
                yield _batch(rows[i : i + _CHUNK_ROWS])

    return _write(path, batches, facts)


def _write(
    path: str, batches: Callable[[], Iterator[pa.RecordBatch]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    images = boxes = 0
    previous = (-1, b"")
    index_crc: list[int] = []
    boxes_crc: list[int] = []

    def counted() -> Iterator[Chunk]:
        nonlocal images, boxes, previous
        for batch in batches():
            if not batch.num_rows:
                continue
            chunk = Chunk.of(batch)
            first = (int(chunk.hashes[0]), chunk.key(0))
            if first <= previous:
                raise UserError(f"{path}: image {first[1].decode()!r} appears twice")
            previous = (int(chunk.hashes[-1]), chunk.key(len(chunk.hashes) - 1))
            images, boxes = images + batch.num_rows, boxes + len(chunk.boxes)
            index_crc.append(chunk.index_crc())
            boxes_crc.extend(map(chunk.boxes_crc, range(chunk.blocks)))
            yield chunk

    # The manifest comes before the rows, so the hash needs a separate pass.
    sha256 = content_hash(counted())
    manifest = {
        **facts,
        "format_version": FORMAT_VERSION,
        "versions": {  # of the libraries that determine the boxes
            "opencv": cv2.__version__,
            "numpy": np.__version__,
            "region_pretrain": __version__,
        },
        "images": images,
        "boxes": boxes,
        "sha256": sha256,
        "index_crc32": index_crc,
        "boxes_crc32": boxes_crc,
    }
    text = json.dumps(manifest, sort_keys=True).encode()
    schema = SCHEMA.with_metadata({MANIFEST_KEY: text, CHECKSUM_KEY: checksum_of(text)})

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches():
                writer.write_batch(batch)

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_atomic(path, write)
    return manifest


def _batch(rows: Sequence[tuple[int, bytes, int, int, np.ndarray]]) -> pa.RecordBatch:
    """Sorted (hash, key, width, height, boxes) rows as a record batch of the store."""
    all_boxes = []
    for i, (_, key, width, height, boxes) in enumerate(rows):
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        if i and rows[i - 1][:2] == rows[i][:2]:
            raise UserError(f"image {key.decode()!r} appears twice: keys of images must be unique")
        inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] <= (width, height))
        if not (inside & (boxes[:, :2] < boxes[:, 2:])).all():
            raise UserError(
                f"image {key.decode()!r} is {width}x{height} and has boxes that are empty or not "
                f"within it, e.g. {boxes.tolist()[:3]}: boxes must be XYXY in pixels of the image"
            )
        all_boxes.append(boxes)
    offsets = np.concatenate([[0], np.cumsum([len(boxes) for boxes in all_boxes])]).astype(np.int64)
    values = np.concatenate([np.zeros((0, 4), np.float32), *all_boxes]).reshape(-1)
    list_type = SCHEMA.field("boxes").type
    boxes_column = pa.LargeListArray.from_arrays(
        pa.array(offsets),
        pa.FixedSizeListArray.from_arrays(pa.array(values), type=list_type.value_type),
        type=list_type,
    )
    columns = [
        pa.array([row[1].decode() for row in rows], pa.large_string()),
        pa.array([row[0] for row in rows], pa.uint64()),
        pa.array([row[2] for row in rows], pa.int32()),
        pa.array([row[3] for row in rows], pa.int32()),
        boxes_column,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
