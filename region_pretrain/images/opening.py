"""The bytes of image files, and whether an error is the file's own."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time

from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError, describe
from region_pretrain.images.reading import UnreadableImage

logger = logging.getLogger(__name__)

#: Seconds before each further attempt, while a file server restarts or a network recovers.
_WAITS = (1, 5, 15)
#: Errors that another attempt would meet again. All others are those of a disk, server or process.
_OF_THE_FILE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ENXIO,
)


class FileSystemFailure(UserError):
    """A disk, file server or network fails, so the file itself may be intact."""


def read_bytes(path: str, name: str) -> bytes:
    """Read an image file or any URI that PathManager opens.

    An error of the file system is met with further attempts for 21 s.

    Args:
        path: the file.
        name: its name in messages.

    Raises:
        UnreadableImage: the file is missing, or no file that can be read.
        FileSystemFailure: no image may be left out for that.
    """
    waits = iter(_WAITS)
    while True:
        try:
            return _read(os.fspath(path), name)
        except FileNotFoundError as error:
            raise UnreadableImage(f"{name}: no such file") from error
        except ValueError as error:  # a null byte in the name
            raise UnreadableImage(f"{name}: cannot be read: {describe(error)}") from error
        except OSError as error:
            wait = next(waits, None)
            if wait is None or is_of_the_file(error):
                raise reading_error(error, name, sum(_WAITS)) from error
            logger.warning("%s: %s; trying again in %g s", name, describe(error), wait)
        time.sleep(wait)


def is_of_the_file(error: OSError) -> bool:
    """Whether an error is that of one file, rather than of a disk, file server, network or process.

    One without a number, as of a decoder or a PathManager handler, is the file's.
    """
    if isinstance(reason := getattr(error, "reason", None), OSError):
        error = reason  # of a URLError
    if isinstance(error, ConnectionError | TimeoutError):
        return False
    return error.errno is None or error.errno in _OF_THE_FILE


def reading_error(error: OSError, name: str, seconds: float = 0) -> UserError:
    """The exception for a file that could not be read.

    Args:
        error: the cause.
        name: the file's name.
        seconds: for how long it was tried.

    Returns:
        An :class:`UnreadableImage` if the error is that of the file.
    """
    if is_of_the_file(error):
        return UnreadableImage(f"{name}: cannot be read: {describe(error)}")
    tried = f", even after {seconds:g} s" if seconds else ""
    return FileSystemFailure(
        f"{name}: the file system cannot read it{tried}: {describe(error)}; repair the disk or "
        "file server, then continue"
    )


def _read(path: str, name: str) -> bytes:
    # A local file is read with one system call; PathManager and a buffer take twice as long.
    if "://" in path:
        with PathManager.open(path, "rb") as file:
            return file.read()
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UnreadableImage(f"{name}: not a regular file")
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such pipes
