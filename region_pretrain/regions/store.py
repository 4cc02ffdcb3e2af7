"""The region store: one memory-mapped Arrow IPC file with one row per image.

Columns: ``key`` (large_string), ``key_hash`` (uint64), ``width`` and ``height`` (int32),
``boxes`` (large_list of fixed_size_list of 4 float32: XYXY, absolute, half-open). Rows are sorted
by ``key_hash``, then ``key``, in record batches of any length. The schema's metadata contains the
manifest as JSON and its CRC-32. The manifest has the CRC-32 of everything but the boxes per record
batch, compared when the store is opened, and that of the boxes per block of 256 rows of a record
batch, compared when a block is first read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError, describe
from region_pretrain.files import printable

FORMAT_VERSION = 2
MANIFEST_KEY = b"region_pretrain.regions"
CHECKSUM_KEY = b"region_pretrain.regions.crc32"
#: The extension of a store replaces a file that is open; Windows refuses that for mapped files.
_CAN_REPLACE_MAPPED = os.name == "posix"
_BLOCK_ROWS = 256
SCHEMA = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("key_hash", pa.uint64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field(
            "boxes",
            pa.large_list(
                pa.field("item", pa.list_(pa.field("item", pa.float32(), False), 4), False)
            ),
            nullable=False,
        ),
    ]
)
_MANIFEST_FIELDS = {
    "recipe": str,
    "images": int,
    "boxes": int,
    "sha256": str,
    "versions": dict,
    "index_crc32": list,
    "boxes_crc32": list,
}


class UnknownImage(UserError, KeyError):
    """A key without a row in the store."""

    __str__ = Exception.__str__  # KeyError's would quote the message


def key_hash(key: bytes) -> int:
    """The 64-bit hash of an image's UTF-8 key by which rows are sorted."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


class Chunk(NamedTuple):
    """One record batch as views of the mapped file: ``n`` rows with ``m`` boxes in total.

    Attributes:
        hashes: ``(n,)`` uint64, in non-decreasing order.
        key_offsets: ``(n + 1,)`` int64 into ``key_bytes``.
        key_bytes: UTF-8 of all keys.
        widths, heights: ``(n,)`` int32.
        box_offsets: ``(n + 1,)`` int64 into ``boxes``.
        boxes: ``(m, 4)`` float32.
    """

    hashes: np.ndarray
    key_offsets: np.ndarray
    key_bytes: memoryview
    widths: np.ndarray
    heights: np.ndarray
    box_offsets: np.ndarray
    boxes: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> Chunk:
        """View a record batch of :data:`SCHEMA` without copying."""
        n = batch.num_rows
        keys, hashes, widths, heights, boxes = batch.columns
        _, key_offsets, key_bytes = keys.buffers()
        values = boxes.values
        return cls(
            hashes=hashes.to_numpy(),
            key_offsets=np.frombuffer(key_offsets, np.int64)[keys.offset : keys.offset + n + 1],
            key_bytes=memoryview(key_bytes if key_bytes is not None else b""),
            widths=widths.to_numpy(),
            heights=heights.to_numpy(),
            box_offsets=boxes.offsets.to_numpy(),
            boxes=values.flatten().to_numpy().reshape(-1, 4),
        )

    def key(self, i: int) -> bytes:
        """The key of row ``i`` of this chunk."""
        return bytes(self.key_bytes[self.key_offsets[i] : self.key_offsets[i + 1]])

    def boxes_of(self, i: int) -> np.ndarray:
        """``(N, 4)`` float32, a read-only view."""
        return self.boxes[self.box_offsets[i] : self.box_offsets[i + 1]]

    def index_crc(self) -> int:
        """CRC-32 of everything but the boxes."""
        first, last = self.key_offsets[[0, -1]]
        crc = zlib.crc32(self.key_bytes[first:last])
        for offsets in (self.key_offsets, self.box_offsets):
            crc = zlib.crc32(offsets - offsets[0], crc)
        for column in (self.hashes, self.widths, self.heights):
            crc = zlib.crc32(np.ascontiguousarray(column), crc)
        return crc

    @property
    def blocks(self) -> int:
        """Number of blocks of rows."""
        return -(-len(self.hashes) // _BLOCK_ROWS)

    def boxes_crc(self, block: int) -> int:
        """CRC-32 of the boxes of a block."""
        return zlib.crc32(self._block(block)[2])

    def boxes_fit(self, block: int) -> bool:
        """Whether the boxes of a block are finite, not empty and within their images."""
        rows, counts, boxes = self._block(block)
        sizes = np.stack([self.widths[rows], self.heights[rows]], axis=1).repeat(counts, axis=0)
        inside = (boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= sizes)
        return bool(inside.all())  # False for NaN

    def _block(self, block: int) -> tuple[slice, np.ndarray, np.ndarray]:
        rows = slice(block * _BLOCK_ROWS, (block + 1) * _BLOCK_ROWS)
        offsets = self.box_offsets[rows.start : rows.stop + 1]
        return rows, np.diff(offsets), self.boxes[offsets[0] : offsets[-1]]


class RegionStore:
    """The regions of many images in a memory-mapped file; see :meth:`open`.

    It pickles as its path, so worker processes map the same pages.

    Attributes:
        path: path of the file.
        manifest: facts about the file: ``recipe`` (id), ``versions`` of the libraries that wrote
            it, ``images`` and ``boxes`` (counts), ``sha256`` of the content (:func:`content_hash`),
            ``format_version``, checksums, and facts that the writer added, e.g. the recipe's
            ``parameters``.
    """

    def __init__(self, path: str, manifest: dict[str, Any], chunks: list[Chunk]) -> None:
        self.path = path
        self.manifest = manifest
        self.chunks = chunks
        lengths = [len(chunk.hashes) for chunk in chunks]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._last_hashes = np.array([chunk.hashes[-1] for chunk in chunks], np.uint64)
        blocks = [0, *np.cumsum([chunk.blocks for chunk in chunks]).tolist()]
        self._first_blocks = blocks[:-1]
        self._checked = bytearray(blocks[-1])  # per block, whether it is intact

    @classmethod
    def open(cls, path: str) -> RegionStore:
        """Map a store, which takes a tenth of a second for a million images.

        Raises:
            UserError: the file is missing, damaged or not a region store.
        """
        path = os.fspath(path)
        local = PathManager.get_local_path(path)
        if not os.path.isfile(local):
            raise UserError(
                f"no region store {path}: create it with region-pretrain regions, or name another "
                "(dataloader.train.dataset.regions=FILE)"
            )
        try:
            with open(local, "rb") as file:
                start = file.read(6)
            if not b"ARROW1".startswith(start.rstrip(b"\0")):  # a damaged one may be cut or zero
                raise UserError(
                    f"{path} is not a region store, but another file: choose another --out, or "
                    "name another store"
                )
            if _CAN_REPLACE_MAPPED:
                reader = pa.ipc.open_file(pa.memory_map(local, "r"))
            else:
                reader = pa.ipc.open_file(Path(local).read_bytes())
            manifest = _read_manifest(path, reader.schema)
            chunks = []
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i)
                batch.validate()  # lengths and last offsets
                if batch.num_rows:
                    chunks.append(Chunk.of(batch))
            rows = sum(len(chunk.hashes) for chunk in chunks)
            boxes = sum(int(c.box_offsets[-1] - c.box_offsets[0]) for c in chunks)
            if (rows, boxes) != (manifest["images"], manifest["boxes"]):
                raise ValueError(f"{rows} images and {boxes} boxes, unlike its manifest")
            if [chunk.index_crc() for chunk in chunks] != manifest["index_crc32"]:
                raise ValueError("the checksum of its index is wrong")
            if sum(chunk.blocks for chunk in chunks) != len(manifest["boxes_crc32"]):
                raise ValueError("checksums are missing")
        except UserError:
            raise
        except Exception as error:  # damaged bytes raise many kinds of exceptions
            reason = describe(error)[:200]
            raise UserError(
                f"{path} is not a region store or is damaged ({reason}): "
                "delete it and create it again with region-pretrain regions"
            ) from error
        return cls(os.path.abspath(path) if os.path.exists(path) else path, manifest, chunks)

    def __reduce__(self):
        return RegionStore.open, (self.path,)

    def __repr__(self) -> str:
        return f"RegionStore({self.path!r}, {self.manifest['recipe']!r}, {len(self)} images)"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __contains__(self, key: str) -> bool:
        return self._find(str(key).encode()) >= 0

    def keys(self) -> Iterator[str]:
        """The images' keys in the order of the rows."""
        for chunk in self.chunks:
            for i in range(len(chunk.hashes)):
                yield chunk.key(i).decode()

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Look up the rows of images.

        Args:
            keys: ``n`` keys.

        Returns:
            ``(n,)`` int64 row numbers, -1 for an image that is not in the store.
        """
        raw = [str(key).encode() for key in keys]
        hashes = np.fromiter((key_hash(key) for key in raw), np.uint64, len(raw))
        rows = np.full(len(raw), -1, np.int64)
        owners = np.searchsorted(self._last_hashes, hashes, side="left")
        for c, chunk in enumerate(self.chunks):
            (members,) = np.nonzero(owners == c)
            local = np.searchsorted(chunk.hashes, hashes[members], side="left")
            for member, i in zip(members.tolist(), local.tolist(), strict=True):
                # the first row of the hash is nearly always the right one; keys may share a hash
                same = chunk.key(i) == raw[member]
                rows[member] = self._starts[c] + i if same else self._find(raw[member])
        return rows

    def boxes(self, key: str) -> np.ndarray:
        """An image's regions.

        Returns:
            ``(N, 4)`` float32 XYXY in pixels of the original image, half-open; a copy.

        Raises:
            UnknownImage: the image is not in the store; also a KeyError.
            UserError: the boxes are damaged.
        """
        return self.entry(key)[1]

    def entry(self, key: str) -> tuple[tuple[int, int], np.ndarray]:
        """:meth:`size` and :meth:`boxes` with one look-up."""
        row = self._find(str(key).encode())
        if row < 0:
            raise UnknownImage(f"{self.path} has no regions for image {key!r}")
        c = int(np.searchsorted(self._starts, row, side="right")) - 1
        chunk, i = self.chunks[c], row - int(self._starts[c])
        if not self._checked[self._first_blocks[c] + i // _BLOCK_ROWS]:
            self._check_block(c, i // _BLOCK_ROWS)
        return (int(chunk.widths[i]), int(chunk.heights[i])), chunk.boxes_of(i).copy()

    def size(self, key: str) -> tuple[int, int]:
        """``(width, height)`` in pixels of the image that the regions were made for.

        Raises:
            UnknownImage: the image is not in the store; also a KeyError.
        """
        return self.entry(key)[0]

    def counts(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Number of boxes per row.

        Args:
            rows: ``(n,)`` int64 row numbers, not negative; all rows by default.

        Returns:
            ``(n,)`` int64.
        """
        if not self.chunks:
            counts = np.zeros(0, np.int64)
        else:
            counts = np.concatenate([np.diff(chunk.box_offsets) for chunk in self.chunks])
        return counts if rows is None else counts[rows]

    def verify(self) -> None:
        """Read all boxes and compare their checksums.

        Raises:
            UserError: the content is damaged.
        """
        for c, chunk in enumerate(self.chunks):
            for block in range(chunk.blocks):
                self._check_block(c, block)

    def _check_block(self, c: int, block: int) -> None:
        chunk, n = self.chunks[c], self._first_blocks[c] + block
        fault = ""
        if chunk.boxes_crc(block) != self.manifest["boxes_crc32"][n]:
            fault = "the checksum of some boxes is wrong"
        elif not chunk.boxes_fit(block):
            fault = "boxes are not finite, empty or not within their image"
        if fault:
            key = printable(chunk.key(block * _BLOCK_ROWS).decode())
            raise UserError(
                f"{self.path} is damaged: {fault}, in the block of image {key!r}; delete it and "
                "create it again with region-pretrain regions"
            )
        self._checked[n] = True

    def _find(self, key: bytes) -> int:
        """The key's row, or -1. Rows with the same hash, but other keys, are skipped."""
        target = np.uint64(key_hash(key))
        c = int(self._last_hashes.searchsorted(target))
        while c < len(self.chunks):
            chunk = self.chunks[c]
            for i in range(int(chunk.hashes.searchsorted(target)), len(chunk.hashes)):
                if chunk.hashes[i] != target:
                    return -1
                if chunk.key(i) == key:
                    return int(self._starts[c]) + i
            c += 1
        return -1


def _read_manifest(path: str, schema: pa.Schema) -> dict[str, Any]:
    """The manifest of a store; raises ValueError if it is damaged."""
    metadata = schema.metadata or {}
    text = metadata.get(MANIFEST_KEY)
    if text is None:
        raise UserError(f"{path} is an Arrow file, but not a region store")
    manifest = json.loads(text)
    if not isinstance(manifest, dict):
        raise ValueError("its manifest is not a dict")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has store format {manifest.get('format_version')}, but this version "
            f"reads {FORMAT_VERSION}: make the regions again, or install the version that "
            "wrote it"
        )
    if metadata.get(CHECKSUM_KEY) != checksum_of(text):
        raise ValueError("the checksum of its manifest is wrong")
    wrong = [k for k, kind in _MANIFEST_FIELDS.items() if not isinstance(manifest.get(k), kind)]
    if wrong or not schema.equals(SCHEMA):
        raise ValueError(f"wrong columns, or missing from its manifest: {wrong}")
    return manifest


def checksum_of(manifest: bytes) -> bytes:
    """The entry :data:`CHECKSUM_KEY` for a manifest as JSON."""
    return str(zlib.crc32(manifest)).encode()


def content_hash(chunks: Sequence[Chunk] | Iterator[Chunk]) -> str:
    """sha256 over key, width, height and boxes of all rows in order, for any chunk sizes."""
    digest = hashlib.sha256()
    for chunk in chunks:
        for i in range(len(chunk.hashes)):
            key, boxes = chunk.key(i), chunk.boxes_of(i)
            lengths = (len(key), chunk.widths[i], chunk.heights[i], len(boxes))
            digest.update(np.array(lengths, "<i8").tobytes())
            digest.update(key)
            digest.update(np.ascontiguousarray(boxes, "<f4").tobytes())
    return digest.hexdigest()
