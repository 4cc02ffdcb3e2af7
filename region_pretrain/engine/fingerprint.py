"""Notices that a run's data has changed since its checkpoint was written."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from region_pretrain.config import to_yaml
from region_pretrain.data.contents import Contents
from region_pretrain.errors import UserError
from region_pretrain.files import is_local, write_atomic

logger = logging.getLogger(__name__)

_CHUNK = 2048  # images per task of a thread
_THREADS = 16  # a network file system answers many requests at once
_SHOWN = 3
_COMPARED = 20_000  # names that processes compare at most, evenly spaced: about a second
#: Settings of a loader that do not change its batches.
HARMLESS_OF_LOADERS = ("num_workers", "pin_memory")


class Fingerprint:
    """A digest of all images' names, sizes and modification times, of their regions and settings.

    The main process examines the files in the background, from construction until the fingerprint
    is needed. A compressed list of them in the output folder, ``data_files-<digest>.txt.gz``,
    allows a later run to name the files that differ.

    Args:
        data: the training loader. An optional method ``contents()`` returns its
            :class:`~region_pretrain.data.contents.Contents`; if its regions change during the run,
            ``regions_at(iteration)`` returns their content hash.
        cfg: the config; ``dataloader.train`` contains the settings.
        folder: the run's output folder.
        allow_changed_data: continue with data that has changed.
    """

    def __init__(
        self, data: Any, cfg: DictConfig, folder: str, allow_changed_data: bool = False
    ) -> None:
        contents = _contents_of(data)
        self.allow_changed_data = allow_changed_data
        self._folder = folder
        self._regions_at = getattr(data, "regions_at", lambda iteration: contents.regions)
        self._facts = {
            "images": contents.count,
            "settings": _settings(cfg),
        }
        self._listing: Future[tuple[str, bytes]] = Future()
        self._closed = threading.Event()
        if comm.is_main_process():
            threading.Thread(target=self._examine, args=(contents,), daemon=True).start()

    def close(self) -> None:
        """Stop examining files."""
        self._closed.set()

    def entry(self, iteration: int = 0) -> dict[str, Any]:
        """What the checkpoint after an iteration contains of it; waits for the files.

        For the main process.
        """
        digest, packed = self._listing.result()
        path = self._path(digest)
        if self._facts["images"] and not PathManager.exists(path):
            try:
                write_atomic(path, lambda file: file.write(packed))
            except OSError as error:
                logger.warning("%s cannot be written: %s", path, error)
        return {**self._facts, "regions": self._regions_at(iteration), "files": digest}

    def compare(self, path: str, saved: dict[str, Any] | None, iteration: int = 0) -> None:
        """Compare the data with that of a checkpoint. For the main process.

        Args:
            path: the checkpoint.
            saved: its :meth:`entry`; None if it has none.
            iteration: its last finished iteration.

        Raises:
            UserError: something has changed, and ``allow_changed_data`` is off.
        """
        now = self.entry(iteration)
        if now == saved:
            return
        if not isinstance(saved, dict) or saved.keys() != now.keys():
            changes = ["the checkpoint has no fingerprint to compare with"]
        else:
            changes = [
                *self._changed_files(saved, now),
                *(["other regions"] if saved["regions"] != now["regions"] else []),
                *_changed_settings(saved["settings"], now["settings"]),
            ]
        text = f"the training data is not that of {path}: {'; '.join(changes)}"
        if not self.allow_changed_data:
            raise UserError(
                f"{text}. Undo the changes, set train.allow_changed_data=True to continue with the "
                "data as it is now, or choose another train.output_dir"
            )
        logger.warning("%s; continuing with the data as it is now", text)

    def _path(self, digest: str) -> str:
        return os.path.join(self._folder, f"data_files-{digest[:8]}.txt.gz")

    def _examine(self, contents: Contents) -> None:
        try:
            digest, packed = hashlib.sha256(), bytearray()
            for text in self._chunks(contents):
                digest.update(text)
                packed += gzip.compress(text, compresslevel=1, mtime=0)
            self._listing.set_result((digest.hexdigest(), bytes(packed)))
        except BaseException as error:
            self._listing.set_exception(error)

    def _chunks(self, contents: Contents) -> Iterator[bytes]:
        def lines(start: int) -> bytes:
            if self._closed.is_set():
                raise RuntimeError("the run has ended")
            stop = min(start + _CHUNK, contents.count)
            return "".join(_line(*contents.image(i)) for i in range(start, stop)).encode()

        pool = ThreadPoolExecutor(_THREADS)
        try:
            yield from pool.map(lines, range(0, contents.count, _CHUNK))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _changed_files(self, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
        if saved["files"] == now["files"]:
            return []
        count = f"{now['images']} instead of {saved['images']} images"
        old, new = _read_listing(self._path(saved["files"]), saved["files"]), None
        if old is not None:
            new = _parse(gzip.decompress(self._listing.result()[1]))
        if not old or new is None:
            return [f"{count} (the list of their names is missing)"]
        both = [name for name in new if name in old]
        kinds = {
            "removed images": [name for name in old if name not in new],
            "new images": [name for name in new if name not in old],
            "images of another size": [n for n in both if old[n][0] != new[n][0]],
            "images modified without a change of size": [
                n for n in both if old[n][0] == new[n][0] and old[n][1] != new[n][1]
            ],
            "images with other labels": [n for n in both if old[n][2:] != new[n][2:]],
        }
        found = [
            f"{kind}: {len(names)} (e.g. {', '.join(names[:_SHOWN])})"
            for kind, names in kinds.items()
            if names
        ]
        return found or ["another order of the images"]


def check_same_data(data: Any) -> None:
    """Check that all processes have the same data. They call this together.

    Copies on the machines' own disks may differ: epochs of other lengths would end with processes
    that wait for each other for ever. Such copies may be in folders of other names.

    Args:
        data: the training loader.

    Raises:
        UserError: they do not; the message names the machines.
    """
    if comm.get_world_size() == 1:
        return
    contents, digest = _contents_of(data), hashlib.sha256()
    for index in range(0, contents.count, contents.count // _COMPARED + 1):
        digest.update(repr(os.path.basename(contents.image(index)[0])).encode())
    mine = contents.count, data.iterations_per_epoch, digest.hexdigest(), contents.regions
    everyone = comm.all_gather((socket.gethostname(), mine))
    expected_on, expected = everyone[0]
    others: dict[str, list[str]] = {}
    for rank, (host, found) in enumerate(everyone):
        if found == expected:
            continue
        what = _lengths(*found[:2])
        if found[:2] == expected[:2]:
            what = "other regions" if found[2] == expected[2] else "other images, or another order"
        others.setdefault(f"on {host}: {what}", []).append(str(rank))
    if others:
        differ = [
            f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} {text}"
            for text, ranks in others.items()
        ]
        raise UserError(
            f"the training data is not that of rank 0 on {expected_on} "
            f"({_lengths(*expected[:2])}): {'; '.join(differ)}. Make the copies of the data set "
            "equal, or use a folder that all machines share"
        )


def _lengths(images: int, iterations: int | None) -> str:
    return f"{images} images, {iterations} iterations per epoch"


def _contents_of(data: Any) -> Contents:
    return data.contents() if hasattr(data, "contents") else Contents(0, lambda _: ("", 0))


def _settings(cfg: DictConfig) -> str:
    """``dataloader.train`` as YAML, without what does not change its batches."""
    values = OmegaConf.to_container(cfg.dataloader.train, resolve=True)
    kept = {key: value for key, value in values.items() if key not in HARMLESS_OF_LOADERS}
    return to_yaml(OmegaConf.create(kept, flags={"allow_objects": True}))


def _changed_settings(old: str, new: str) -> list[str]:
    if old == new:
        return []
    lines = difflib.ndiff(old.splitlines(), new.splitlines())
    changed = [f"{line[0]} {line[2:].strip()[:200]}" for line in lines if line[0] in "+-"]
    return [f"dataloader.train: {', '.join(changed[:2 * _SHOWN])}"]


def _line(name: str, others: Any) -> str:
    """One image of the listing: size, modification time (ns), digest of the rest, name."""
    size = time = digest = "-"
    if is_local(name):
        try:
            status = os.stat(name)
            size, time = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):
            size = "missing"
    if others is not None:
        digest = hashlib.blake2b(repr(others).encode(), digest_size=8).hexdigest()
    return f"{size} {time} {digest} {name!r}\n"  # repr: one line, whatever the name


def _read_listing(path: str, digest: str) -> dict[str, tuple[str, ...]] | None:
    try:
        with PathManager.open(path, "rb") as file:
            text = gzip.decompress(file.read())
    except (OSError, EOFError, ValueError):
        return None
    return _parse(text) if hashlib.sha256(text).hexdigest() == digest else None


def _parse(text: bytes) -> dict[str, tuple[str, ...]]:
    """Name -> size, time and digest of each image with it; crops of one file share its name."""
    found: dict[str, tuple[str, ...]] = {}
    for line in text.decode().splitlines():
        size, time, digest, name = line.split(" ", 3)
        found[name] = found[name] + (digest,) if name in found else (size, time, digest)
    return found
