"""Child processes that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1


def start_child(
    command: Sequence[str],
    root: str,
    cwd: str,
    environment: Mapping[str, str | None],
) -> subprocess.Popen:
    """Start a tool that, on Linux, is killed when this process dies.

    The tool ignores USR2 and TERM until it installs its own handlers: SLURM sends these signals to
    every process of a job, and by default they would kill one that is still importing.

    Args:
        command: the command line.
        root: folder of the code, put first on the tool's ``PYTHONPATH``.
        cwd: the tool's working directory.
        environment: variables that differ from this process's; None removes one.
    """
    changed = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    paths = [root, changed.get("PYTHONPATH", "")]
    changed["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    if os.name != "posix":  # Windows has neither these signals nor preexec_fn
        return subprocess.Popen(command, cwd=cwd, env=changed)
    follow = following_parent(signal.SIGKILL)

    def in_child() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        follow()

    return subprocess.Popen(command, cwd=cwd, env=changed, preexec_fn=in_child)


def following_parent(number: signal.Signals, parent: int | None = None) -> Callable[[], None]:
    """A function after whose call the kernel signals the process when its parent dies (Linux only).

    Args:
        number: the signal.
        parent: process id of the parent; default: this process, for a ``preexec_fn``.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    expected = os.getpid() if parent is None else parent

    def follow() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, number)
            if os.getppid() != expected:
                os._exit(1)  # the parent died before prctl took effect

    return follow
