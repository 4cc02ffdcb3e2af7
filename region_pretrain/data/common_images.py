"""Images that are in two data sets, such as those for training and validation."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence

from region_pretrain.files import sha256_of


def files_of(records: Sequence[Mapping]) -> list[str]:
    """The files of records that have one, in folders without links: these are few."""
    folder = functools.cache(os.path.realpath)
    paths = (os.path.split(record["file_name"]) for record in records if "file_name" in record)
    return [os.path.join(folder(path), name) for path, name in paths]


def same_images(one: str, other: str, records: Sequence[Mapping], others: Sequence[Mapping]) -> str:
    """Note that images are in two data sets, by path or content; "" if there are none."""
    if not (shared := _shared_images(records, others)):
        return ""
    return f"{one} and {other} have {len(shared)} images in common, e.g. {shared[0]}"


def _shared_images(a: Sequence[Mapping], b: Sequence[Mapping]) -> list[str]:
    """Files of ``a`` that are also in ``b``, by path or content."""

    def by_size(records: Sequence[Mapping]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for record in records:
            path = os.path.realpath(record["file_name"])
            if os.path.exists(path):
                found.setdefault(os.path.getsize(path), []).append(path)
        return found

    sizes = by_size(b)
    shared = []
    for size, paths in by_size(a).items():
        others = set(sizes.get(size, ()))
        digests = {sha256_of(path) for path in others} if set(paths) - others and others else set()
        shared += [p for p in paths if p in others or digests and sha256_of(p) in digests]
    return shared
