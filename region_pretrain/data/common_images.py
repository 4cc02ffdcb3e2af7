"""Images that are in two data sets, such as those for training and validation."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence


def resolved(records: Sequence[Mapping]) -> list[str]:
    """The files of a data set, in folders without links: these are few, unlike the files."""
    folder = functools.cache(os.path.realpath)
    paths = (os.path.split(record["file_name"]) for record in records)
    return [os.path.join(folder(path), name) for path, name in paths]


def same_files(one: str, other: str, files: Mapping[str, Sequence[str]]) -> str:
    """Note that files are in two data sets; "" if there are none.

    Args:
        one, other: their names.
        files: name -> result of :func:`resolved`; data sets that are absent have no files.
    """
    others = set(files.get(other, ()))
    return _note(one, other, [path for path in files.get(one, ()) if path in others])


def same_images(one: str, other: str, records: Sequence[Mapping], others: Sequence[Mapping]) -> str:
    """Note that images are in two data sets, by path or content; "" if there are none."""
    return _note(one, other, _shared_images(records, others))


def _note(one: str, other: str, shared: Sequence[str]) -> str:
    if not shared:
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

    def digest(path: str) -> bytes:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()

    sizes = by_size(b)
    shared = []
    for size, paths in by_size(a).items():
        others = set(sizes.get(size, ()))
        digests = {digest(path) for path in others} if set(paths) - others and others else set()
        shared += [p for p in paths if p in others or digests and digest(p) in digests]
    return shared
