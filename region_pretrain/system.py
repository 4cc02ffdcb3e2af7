"""What differs between operating systems: cores, processes, signals, memory.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import getpass
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext

try:
    import resource
except ImportError:  # Windows
    resource = None

#: The signal by which schedulers ask a run to stop; None on Windows, which has no such signal.
USR2: signal.Signals | None = getattr(signal, "SIGUSR2", None)


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def user_name() -> str:
    """The user of this process: the name, or the number of one without a name, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        return str(os.getuid())


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = (name.strip() for name in given.split(",") if name.strip())
        # As CUDA does, which hides those after -1, NoDevFiles or another name that is unknown.
        return list(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, names))
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(len(re.findall("^GPU ", done.stdout, re.MULTILINE)))]


def process_context() -> BaseContext:
    """How to start worker processes: by fork on Linux, elsewhere as Python does by default.

    macOS has fork, but its frameworks crash in forked processes.
    """
    by_fork = sys.platform == "linux" and hasattr(os, "fork")
    return multiprocessing.get_context("fork" if by_fork else None)


@contextmanager
def one_opencv_thread() -> Iterator[None]:
    """Let OpenCV use the calling thread only within the context.

    Not by ``cv2.setNumThreads(1)``, which waits for the end of OpenCV's other threads: for ever in
    a process that was forked while they existed.
    """
    import cv2  # not needed by the commands that only look at runs

    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        if threads > 1:
            cv2.setNumThreads(threads)


def process_start(pid: int) -> str | None:
    """The start time of a process of this machine, which differs if the pid is used again.

    Returns:
        The time, in clock ticks since boot on Linux; "" if unknown; None if it is not running.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
        return None if state in (b"Z", b"X") else fields[18].decode()  # zombie, dead
    except OSError:  # no such process, one of another user, or no /proc
        pass
    if not os.path.isdir("/proc/self"):
        import psutil  # not needed on Linux

        try:
            process = psutil.Process(pid)
            ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return None if ended else str(process.create_time())
        except psutil.NoSuchProcess:
            return None
        except psutil.AccessDenied:
            return ""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        pass
    return ""


def command_lines() -> dict[int, str]:
    """Process id -> command line of the processes of this machine that this one may inspect."""
    found = {}
    if not os.path.isdir("/proc/self"):
        import psutil

        for process in psutil.process_iter(["cmdline"]):
            found[process.pid] = " ".join(process.info["cmdline"] or ())
        return found
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found[int(pid)] = file.read().decode("utf-8", "replace").replace("\0", " ")
        except OSError:  # it has just ended
            continue
    return found


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        import psutil

        return psutil.Process().memory_info().rss / 2**20


def peak_resident_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):  # StopIteration: sandboxed kernels such as gVisor's
        pass
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB
    import psutil

    return psutil.Process().memory_info().peak_wset / 2**20
