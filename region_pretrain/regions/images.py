"""What a region store knows of the images that it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence

from region_pretrain.images import UnreadableImage, read_record
from region_pretrain.regions.store import RegionStore


def readable(record: dict) -> bool:
    """Whether the image of a record can be decoded."""
    try:
        read_record(record)
    except UnreadableImage:
        return False
    return True


def digest_of_keys(records: Sequence[dict]) -> str:
    """sha256 of the keys of images, in order."""
    digest = hashlib.sha256()
    for record in records:
        key = str(record["image_id"]).encode()
        digest.update(len(key).to_bytes(8, "little") + key)
    return digest.hexdigest()


def file_sizes(records: Sequence[dict]) -> dict[str, int]:
    """Key -> bytes, of local files that exist."""
    found = {}
    for record in records:
        with contextlib.suppress(OSError):
            found[str(record["image_id"])] = os.path.getsize(record["file_name"])
    return found


def changed_files(store: RegionStore, records: Sequence[dict]) -> tuple[list[str], int]:
    """Compare files with those that a store was made from, of which it knows the size of a sample.

    Returns:
        The files of another size, e.g. ``'00.png' had 10 bytes and has 12``, and the number of
        files compared: 0 if the store knows none of them.
    """
    known = store.manifest.get("file_sizes", {})
    some = [record for record in records if str(record["image_id"]) in known]
    # A file that could not be read may have been replaced.
    found = store.rows([str(record["image_id"]) for record in some]) >= 0
    now = file_sizes([record for record, has in zip(some, found, strict=True) if has])
    changed = [
        f"{key!r} had {known[key]} bytes and has {size}"
        for key, size in now.items()
        if size != known[key]
    ]
    return changed, len(now)
