"""What a region store knows of the images that it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence

from region_pretrain.images import UnreadableImage, read_record


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
