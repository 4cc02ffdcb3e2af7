"""Files that are either complete or absent, even if the writer is killed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

from region_pretrain.errors import UserError, describe
from region_pretrain.system import process_start

_PART = ".part"
#: NFS clients remember a missing file for up to 60 s.
NFS_SECONDS = 90.0


def is_local(path: str) -> bool:
    """Whether a path is on a mounted file system, as opposed to a PathManager URL."""
    return "://" not in path


def write_atomic(path: str, write: Callable[[IO[bytes]], None], durable: bool = True) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it.

    A PathManager URL is written in place.

    Args:
        path: the file; an existing one is replaced.
        write: called with the open binary file.
        durable: wait until the disk has it; otherwise a crash of the machine may leave the older
            content, or an empty file.

    Raises:
        OSError: the file could not be written. The temporary file has been removed, and an existing
            file is unchanged.
    """
    if not is_local(path):
        from detectron2.utils.file_io import PathManager  # imports PyTorch, which takes seconds

        with PathManager.open(path, "wb") as f:
            write(f)
        return
    part = f"{path}{_PART}-{socket.gethostname()}-{os.getpid()}"  # machines may share the folder
    try:
        with open(part, "wb") as f:
            write(f)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise
    if not durable or os.name != "posix":  # Windows cannot open a folder
        return
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def write_text_atomic(path: str, text: str, durable: bool = True) -> None:
    """Write a text file as :func:`write_atomic` does."""
    write_atomic(path, lambda f: f.write(text.encode("utf-8")), durable)


def make_writable(folder: str, key: str) -> None:
    """Create a folder before results for it are computed, and check that it takes files.

    Args:
        folder: a local one, else it is only created; "" is the current one.
        key: what names it, for the message: an option or a config key.

    Raises:
        UserError: it cannot be created, or no file can be written to it.
    """
    try:
        if is_local(folder):
            os.makedirs(folder or ".", exist_ok=True)
            with tempfile.TemporaryFile(dir=folder or "."):
                return
        from detectron2.utils.file_io import PathManager

        PathManager.mkdirs(folder)
    except OSError as error:
        raise UserError(f"cannot write to {key} {folder or '.'}: {describe(error)}") from error


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock of a file that several processes write; waits for at most an hour.

    Raises:
        UserError: the file system has no locks, or another process has held it for an hour.
    """
    from iopath.common.file_io import file_lock
    from portalocker.exceptions import LockException

    lock = file_lock(path)
    try:
        lock.acquire()
    except LockException as error:
        raise UserError(
            f"cannot lock {path} ({' '.join(str(error).split())}): if its file system has no locks "
            "(Lustre without -o flock), use another one; if another process was still writing, run "
            "again"
        ) from error
    try:
        yield
    finally:
        lock.release()


def remove_parts(folder: str, prefix: str = "", shared: bool = False) -> None:
    """Remove what killed writers left in a folder.

    Args:
        folder: a local folder; others are left alone.
        prefix: only parts of files whose names begin like this.
        shared: other processes may be writing to the folder: what they may still need is kept, i.e.
            files of running processes, and those of other machines that are younger than a day.
    """
    if not is_local(folder):
        return
    pattern = f"{glob.escape(os.path.join(folder, prefix))}*{_PART}-*"
    for part in glob.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if not shared or _is_abandoned(part):
                os.remove(part)


def _is_abandoned(part: str) -> bool:
    host, _, pid = part.rpartition(f"{_PART}-")[2].rpartition("-")
    if host != socket.gethostname() or not pid.isdigit():
        return now_at(os.path.dirname(part)) - os.path.getmtime(part) > 24 * 3600
    return int(pid) == os.getpid() or process_start(int(pid)) is None


def now_at(folder: str) -> float:
    """The time that a file written to a folder now would have.

    Compare modification times with this one: a file server's clock may differ from this machine's,
    which is only used if the folder is not writable.
    """
    try:
        with tempfile.TemporaryFile(dir=folder or ".") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


@contextlib.contextmanager
def reported_if_stuck(what: str, seconds: float) -> Iterator[None]:
    """Print a line if the context, which only reads or writes files, takes longer than this."""

    def report() -> None:
        text = f"{what}: the file system has not answered for {seconds:.0f} s; waiting"
        print(text, file=sys.stderr, flush=True)

    timer = threading.Timer(seconds, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def sha256_of(path: str) -> str:
    """sha256 of a local file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def printable(name: str) -> str:
    """A file name on one line of UTF-8: control characters and invalid bytes are escaped."""
    return name if name.isprintable() else "".join(map(_escaped, name))


def _escaped(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, means that the disk or quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(folder: str) -> int | None:
    """Free bytes on the file system of a local folder; None if unknown."""
    return shutil.disk_usage(folder).free if is_local(folder) and os.path.isdir(folder) else None
