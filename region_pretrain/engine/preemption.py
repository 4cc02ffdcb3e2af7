"""Stops a run between two steps when a scheduler or its user sends a signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed as dist

from region_pretrain.errors import Stopped
from region_pretrain.lease import machine
from region_pretrain.system import USR2, process_start

_SIGNALS = tuple(n for n in (USR2, signal.SIGTERM, signal.SIGINT) if n is not None)
_RETRY_SECONDS = 0.1


@contextmanager
def stop_signals_handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle USR2, TERM and Ctrl-C in the context; no effect in a thread, which receives none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # The shell of a background job may have turned Ctrl-C off.
    numbers = [n for n in _SIGNALS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    usual = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in usual.items():
            signal.signal(number, previous)


class StopRequest:
    """A stop signal that any rank may receive and that all ranks act on after the same step.

    After each step every rank starts an all-reduce of its flag and reads the result of the previous
    one. It runs on the CPU (in a separate gloo group) during the next step, so it neither
    synchronises the device nor makes a rank wait longer than the gradients' all-reduce does.

    All ranks construct it together.

    Attributes:
        received: the signals that this process received.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._group = dist.new_group(backend="gloo") if comm.get_world_size() > 1 else None
        self._flag: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._finished: Callable[[], bool] = lambda: False
        ranks = comm.all_gather((machine(), os.getpid(), process_start(os.getpid())))
        self._peers = [(pid, start) for where, pid, start in ranks if where == machine()]

    @contextmanager
    def listen(self, finished: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Treat USR2, TERM and Ctrl-C as requests to stop; a second TERM or Ctrl-C ends at once.

        Outside of a job that submitit started, where TERM means USR2, TERM also ends a process

        - of which another rank on this machine has ended: the launcher then terminates the others;
        - for which nothing is left to save, and so does Ctrl-C.

        Processes forked within the context, such as a loader's workers, ignore the signals.

        Args:
            finished: whether the last checkpoint has been saved.
        """
        self._finished = finished
        usual = sys.unraisablehook
        sys.unraisablehook = lambda lost: usual(lost) if lost.exc_type is not Stopped else _retry()
        try:
            with stop_signals_handled(self._on_signal):
                yield
        finally:
            sys.unraisablehook = usual

    def _on_signal(self, number: int, frame: object) -> None:
        again = number in self.received
        self.received.append(number)
        by_hand = number == signal.SIGINT or (
            number == signal.SIGTERM and "SUBMITIT_EXECUTOR" not in os.environ
        )
        if not by_hand:
            return
        if number == signal.SIGTERM and any(process_start(p) != start for p, start in self._peers):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._finished():
            raise Stopped
        elif again:
            raise KeyboardInterrupt
        elif comm.is_main_process():
            # Logging may not be interrupted by itself.
            os.write(2, b"stopping after this step, once its checkpoint is saved\n")

    def agreed(self) -> bool:
        """Whether all ranks must stop now. Every rank calls this once after each step."""
        if self._group is None:
            return bool(self.received)
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._flag.item())
        self._flag = torch.tensor([int(bool(self.received))])
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def close(self) -> None:
        """Wait for the pending all-reduce. All ranks call this after the same step."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def _retry() -> None:
    """Send TERM again, which arrived in a ``__del__``: Python ignores exceptions there."""
    timer = threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def _ignore_in_fork() -> None:
    handled = [
        number
        for number in _SIGNALS
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopRequest)
    ]
    for number in handled:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGTERM in handled:
        # PyTorch installs another handler in a loader's workers, which ends them. While the signal
        # is blocked, only this thread receives it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """Exit when the parent process sends TERM, as a loader does with a worker that is stuck."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ignore_in_fork)
