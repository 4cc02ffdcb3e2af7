"""Starting a tool beside the process that looks after it."""

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
    """Start a tool whose code is under ``root``; it ends when this process does.

    USR2 and TERM are ignored in it until it listens itself: SLURM sends them to every process of a
    job, and by default they end one that is still importing.

    Args:
        command: the command line.
        root: comes first on the tool's ``PYTHONPATH``.
        cwd: its working directory.
        environment: variables that differ from this process's; None removes one.
    """
    changed = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
    for name in [k for k, v in environment.items() if v is None]:
        changed.pop(name, None)
    paths = [root, changed.get("PYTHONPATH", "")]
    changed["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    follow = following_parent(signal.SIGKILL)

    def in_child() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        follow()

    return subprocess.Popen(command, cwd=cwd, env=changed, preexec_fn=in_child)


def following_parent(number: signal.Signals) -> Callable[[], None]:
    """A ``preexec_fn`` by which a child gets a signal when this process dies (on Linux)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def follow() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, number)
            if os.getppid() != parent:
                os._exit(1)  # it died before the line above

    return follow
