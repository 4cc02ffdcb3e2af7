"""Exclusive use of an output folder, also on a file system that several machines share.

A lease is a hidden folder of numbered files. The file with the highest number counts, and whoever
creates the next one, which the file system allows only once, holds the lease. The file names the
holder, who updates its modification time as a sign of life. A number is never used again, so two
processes that both find the holder gone cannot both replace it.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from region_pretrain.errors import UserError
from region_pretrain.files import is_local, reported_if_stuck
from region_pretrain.json_files import build
from region_pretrain.system import process_start

logger = logging.getLogger(__name__)

#: Begins the name of every lease.
PREFIX = ".lease"

_BEAT_SECONDS = 10.0  # between two signs of life
#: Longer than Python needs to parse the largest annotation file, during which no thread can run.
_SILENCE_SECONDS = 180.0
_LONGEST_LOOK = 1.0  # seconds of silence that two consecutive looks at the lease can prove
_STUCK_SECONDS = 60.0
_PATIENCE_SECONDS = 3.0  # a process that is being killed still exists for a moment
_POLL_SECONDS = 0.1
_FREE = "{}"
_NEW = "new-"  # begins the name of a file that has no number yet


class InUse(UserError):
    """Another process holds the lease."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease.

    Attributes:
        host: its host name.
        machine: identifies the boot and the PID namespace in which ``pid`` is meaningful.
        pid: its process id.
        started: start time of the process, see :func:`~region_pretrain.system.process_start`.
        since: Unix time at which it obtained the lease.
        job: its SLURM job id, or "".
        restart: how often SLURM had restarted that job.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: float
    job: str = ""
    restart: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """The current process."""
        return cls(
            socket.gethostname(),
            machine(),
            os.getpid(),
            process_start(os.getpid()) or "",
            time.time(),
            os.environ.get("SLURM_JOB_ID", ""),
            int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    def is_here(self) -> bool:
        """Whether it belongs to this machine, since its last boot."""
        return self.machine == machine()

    def has_ended(self) -> bool:
        """Whether it is known to have ended: a process of this machine that is not running."""
        return self.is_here() and process_start(self.pid) not in (self.started, "")

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        job = f" (SLURM job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {since}"


def machine() -> str:
    """Identifies this machine, its boot and this process's PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@contextmanager
def hold(
    folder: str, name: str = PREFIX, what: str = "", patience: float = _PATIENCE_SECONDS
) -> Iterator[None]:
    """Use a folder exclusively within the context. Exactly one of several processes can.

    A holder that is gone is replaced: its process on this machine has ended, its SLURM job has been
    restarted as the current one, or it gives no sign of life for three minutes in which the file
    system answers. A process that has been replaced, such as one that was suspended, exits with
    code 2 at its next sign of life.

    Args:
        folder: an existing local folder; any number of processes may use a PathManager URL.
        name: the lease, if a folder has several.
        what: the name of what it protects in messages; default: the folder.
        patience: seconds to wait for a holder that is running.

    Raises:
        InUse: another process holds the lease; the message names it.
        OSError: the folder is not writable.
    """
    if not is_local(folder):
        yield
        return
    path = _acquire(os.path.join(folder, name), what or folder, patience)
    released = threading.Event()
    threading.Thread(
        target=_give_signs_of_life, args=(path, what or folder, released), daemon=True
    ).start()
    try:
        yield
    finally:
        released.set()
        with suppress(OSError), open(path, "r+b", buffering=0) as file:
            # One call, so that a kill leaves either content.
            file.write(_FREE.encode().ljust(os.path.getsize(path)))


def holder_of(folder: str, name: str = PREFIX) -> Holder | None:
    """Who holds a lease; None if nobody does, or its holder has ended."""
    _, holder, _ = _newest(os.path.join(folder, name))
    return holder if isinstance(holder, Holder) and not holder.has_ended() else None


def _acquire(lease: str, what: str, patience: float) -> str:
    """Create and return the lease's next file."""
    asked = looked_at = time.monotonic()
    silence = 0.0
    seen: tuple[int, float] | None = None
    warned = False
    while True:
        number, holder, beat = _newest(lease)
        now = time.monotonic()
        alive = seen is not None and seen != (number, beat)
        # While the file system does not answer, the holder cannot give a sign of life either.
        silence = 0.0 if alive else silence + min(now - looked_at, _LONGEST_LOOK)
        looked_at = now
        seen = number, beat
        known = isinstance(holder, Holder)
        here = known and holder.is_here()
        restarted = known and _is_restart_of(holder)
        ended = known and holder.has_ended()
        silent = not here and silence > _SILENCE_SECONDS
        if holder is None or restarted or ended or silent:
            if (path := _create(lease, number + 1)) is not None:
                if restarted and not ended:
                    time.sleep(1.5 * _BEAT_SECONDS)  # it notices that it was replaced, and exits
                return path
            seen, silence = None, 0.0
            continue
        if now - asked > patience:
            name = holder or "an unknown process"
            if here or alive:
                stop = f", stop it with kill {holder.pid}," if known else ","
                raise InUse(
                    f"{what} is in use by {name}: wait until it ends{stop} or choose another "
                    f"output; if it no longer runs, delete {lease}"
                )
            if not warned:
                logger.warning(
                    "%s is in use by %s: waiting up to %.0f s for a sign of life from it",
                    what,
                    name,
                    _SILENCE_SECONDS,
                )
                warned = True
        time.sleep(_POLL_SECONDS)


def _is_restart_of(holder: Holder) -> bool:
    me = Holder.this_process()
    return holder.job != "" and holder.job == me.job and holder.restart < me.restart


def _numbers(lease: str) -> list[int]:
    return [int(name) for name in os.listdir(lease) if name.isdecimal()]


def _newest(lease: str) -> tuple[int, Holder | str | None, float]:
    """The highest number, its holder, and the modification time of its file.

    The holder is None if the lease is free, and "" if its file is incomplete.
    """
    try:
        number = max(_numbers(lease), default=0)
    except OSError:
        return 0, None, 0.0
    try:
        # Opening a file makes a network file system look at the server's copy.
        with open(os.path.join(lease, str(number)), encoding="utf-8") as file:
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime
        return number, build(Holder, json.loads(text)) if text.strip() != _FREE else None, beat
    except FileNotFoundError:  # no file yet, or it has just been replaced
        return number, None, 0.0
    except (ValueError, TypeError):
        return number, "", beat


def _create(lease: str, number: int) -> str | None:
    """Create the file of this number; None if another process was faster."""
    with suppress(FileExistsError):
        os.mkdir(lease)
    path = os.path.join(lease, str(number))
    text = json.dumps(asdict(Holder.this_process()))
    part = os.path.join(lease, f"{_NEW}{socket.gethostname()}-{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        _name_exclusively(part, path, text)
    except (FileExistsError, FileNotFoundError):  # FileNotFoundError: it has removed the part
        return None
    finally:
        with suppress(FileNotFoundError):
            os.remove(part)
    numbers = _numbers(lease)
    if number not in numbers or max(numbers) > number:  # this process has slept for long
        with suppress(FileNotFoundError):
            os.remove(path)
        return None
    for name in os.listdir(lease):
        if name.startswith(_NEW) or name.isdecimal() and int(name) < number:
            with suppress(FileNotFoundError):
                os.remove(os.path.join(lease, name))
    return path


def _name_exclusively(part: str, path: str, text: str) -> None:
    """Give a file its name, unless the name is taken; a kill leaves a complete file or none."""
    try:
        os.link(part, path)
    except FileExistsError:
        with open(path, encoding="utf-8") as file:
            if file.read() != text:  # else NFS has lost the answer
                raise
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)


def _give_signs_of_life(path: str, what: str, released: threading.Event) -> None:
    while not released.wait(_BEAT_SECONDS):
        try:
            with reported_if_stuck(what, _STUCK_SECONDS):
                os.utime(path)
        except FileNotFoundError:
            if released.is_set():
                return
            print(
                f"error: {what} was taken over by another process, or its lease "
                f"{os.path.dirname(path)} was deleted: stopping without saving",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)
        except OSError:  # the file system does not answer; the next attempt may succeed
            pass
