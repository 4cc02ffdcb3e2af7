"""The region store: one Arrow IPC file, memory-mapped, one row an image.

Columns: ``key`` (large_string), ``key_hash`` (uint64), ``width`` and ``height`` (int32),
``boxes`` (large_list of fixed_size_list of 4 float32: XYXY, absolute, half-open). Rows are sorted
by ``key_hash`` (then key), cut into record batches of any length. The schema's metadata holds the
manifest as JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_KEY = b"region_pretrain.regions"
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
_MANIFEST_FIELDS = ("recipe", "images", "boxes", "sha256")


class UnknownImage(UserError, KeyError):
    """A key that a store has no row for."""

    __str__ = Exception.__str__  # KeyError's own would quote the message


def key_hash(key: bytes) -> int:
    """The 64-bit hash of an image's key (UTF-8) that rows are sorted by."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


class Chunk(NamedTuple):
    """One record batch as arrays on the mapped file; ``n`` rows with ``m`` boxes together.

    Attributes:
        hashes: ``(n,)`` uint64, not decreasing.
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
        """View a record batch of :data:`SCHEMA`; nothing is copied."""
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


class RegionStore:
    """Regions of many images on a memory-mapped file; make one with :meth:`open`.

    It pickles as its path, so a worker process maps the same pages again.

    Attributes:
        path: of the file.
        manifest: facts of the file: ``recipe`` (id), ``versions`` of the libraries that made it,
            ``images`` and ``boxes`` (counts), ``sha256`` of the content (:func:`content_hash`),
            ``format_version``, and what its maker added, e.g. the recipe's ``parameters``.
    """

    def __init__(self, path: str, manifest: dict[str, Any], chunks: list[Chunk]) -> None:
        self.path = path
        self.manifest = manifest
        self.chunks = chunks
        lengths = [len(chunk.hashes) for chunk in chunks]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._last_hashes = np.array([chunk.hashes[-1] for chunk in chunks], np.uint64)

    @classmethod
    def open(cls, path: str) -> RegionStore:
        """Map a store; takes milliseconds, whatever its size.

        Raises:
            UserError: there is no such file, it is no region store, or it is damaged.
        """
        path = os.fspath(path)
        local = PathManager.get_local_path(path)
        if not os.path.isfile(local):
            raise UserError(f"no region store {path}: make it with tools/make_regions.py")
        try:
            reader = pa.ipc.open_file(pa.memory_map(local, "r"))
            manifest_json = (reader.schema.metadata or {}).get(MANIFEST_KEY)
            if manifest_json is None:
                raise UserError(f"{path} is an Arrow file, but no region store")
            manifest = json.loads(manifest_json)
            if manifest.get("format_version") != FORMAT_VERSION:
                raise UserError(
                    f"{path} has store format {manifest.get('format_version')}, this version reads "
                    f"{FORMAT_VERSION}: make the regions again, or install the version that made it"
                )
            missing = [name for name in _MANIFEST_FIELDS if name not in manifest]
            if missing or not reader.schema.equals(SCHEMA):
                raise ValueError(f"its columns or its manifest are not a store's ({missing})")
            chunks = []
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i)
                batch.validate()  # lengths and last offsets; the content is verify()'s
                if batch.num_rows:
                    chunks.append(Chunk.of(batch))
            rows = sum(len(chunk.hashes) for chunk in chunks)
            boxes = sum(int(c.box_offsets[-1] - c.box_offsets[0]) for c in chunks)
            if (rows, boxes) != (manifest["images"], manifest["boxes"]):
                raise ValueError(f"it holds {rows} images and {boxes} boxes, its manifest differs")
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is no region store or is damaged ({reason}): "
                "make it again with tools/make_regions.py"
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
        """The images' keys, in the order of the rows."""
        for chunk in self.chunks:
            for i in range(len(chunk.hashes)):
                yield chunk.key(i).decode()

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Where the images are.

        Args:
            keys: ``n`` keys.

        Returns:
            ``(n,)`` int64 row numbers, -1 where the store has no such image.
        """
        raw = [str(key).encode() for key in keys]
        hashes = np.fromiter((key_hash(key) for key in raw), np.uint64, len(raw))
        rows = np.full(len(raw), -1, np.int64)
        owners = np.searchsorted(self._last_hashes, hashes, side="left")
        for c, chunk in enumerate(self.chunks):
            (members,) = np.nonzero(owners == c)
            local = np.searchsorted(chunk.hashes, hashes[members], side="left")
            for member, i in zip(members.tolist(), local.tolist(), strict=True):
                # nearly always the first comparison says it; else other keys share the hash
                same = chunk.key(i) == raw[member]
                rows[member] = self._starts[c] + i if same else self._find(raw[member])
        return rows

    def boxes(self, key: str) -> np.ndarray:
        """An image's regions.

        Returns:
            ``(N, 4)`` float32 XYXY in pixels of the original image, half-open; a copy.

        Raises:
            UnknownImage: the store has no such image; also a KeyError.
        """
        chunk, i = self._at(self._row(key))
        return chunk.boxes_of(i).copy()

    def entry(self, key: str) -> tuple[tuple[int, int], np.ndarray]:
        """:meth:`size` and :meth:`boxes` with one look-up."""
        chunk, i = self._at(self._row(key))
        return (int(chunk.widths[i]), int(chunk.heights[i])), chunk.boxes_of(i).copy()

    def size(self, key: str) -> tuple[int, int]:
        """``(width, height)`` of the image that the regions were made for, in pixels.

        Raises:
            UnknownImage: the store has no such image; also a KeyError.
        """
        chunk, i = self._at(self._row(key))
        return int(chunk.widths[i]), int(chunk.heights[i])

    def counts(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Number of boxes of each of the given rows, or of all.

        Args:
            rows: ``(n,)`` int64, none negative.

        Returns:
            ``(n,)`` int64.
        """
        if not self.chunks:
            counts = np.zeros(0, np.int64)
        else:
            counts = np.concatenate([np.diff(chunk.box_offsets) for chunk in self.chunks])
        return counts if rows is None else counts[rows]

    def verify(self) -> None:
        """Read everything and compare it with the manifest's hash.

        Raises:
            UserError: the content is not what was written.
        """
        if content_hash(self.chunks) != self.manifest["sha256"]:
            raise UserError(
                f"{self.path} is damaged: its content does not have the sha256 that its manifest "
                "names; make it again with tools/make_regions.py"
            )

    def _row(self, key: str) -> int:
        row = self._find(str(key).encode())
        if row < 0:
            raise UnknownImage(f"{self.path} has no regions for image {key!r}")
        return row

    def _at(self, row: int) -> tuple[Chunk, int]:
        c = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.chunks[c], row - int(self._starts[c])

    def _find(self, key: bytes) -> int:
        """The key's row, or -1: the first row of its hash, and on while another key has it."""
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


def content_hash(chunks: Sequence[Chunk] | Iterator[Chunk]) -> str:
    """sha256 over the rows in their order: key, width, height, boxes; the same however cut."""
    digest = hashlib.sha256()
    for chunk in chunks:
        for i in range(len(chunk.hashes)):
            key, boxes = chunk.key(i), chunk.boxes_of(i)
            lengths = (len(key), chunk.widths[i], chunk.heights[i], len(boxes))
            digest.update(np.array(lengths, "<i8").tobytes())
            digest.update(key)
            digest.update(np.ascontiguousarray(boxes, "<f4").tobytes())
    return digest.hexdigest()
