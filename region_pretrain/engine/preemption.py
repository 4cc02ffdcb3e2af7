"""Stops a run between two steps when the scheduler sends a signal."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils import comm
from torch import distributed as dist

logger = logging.getLogger(__name__)


class StopRequest:
    """A stop signal that any rank may receive and that all ranks act on after the same step.

    After each step every rank starts an all-reduce of its flag and reads the result of the previous
    one. It runs on the CPU (in a separate gloo group) during the next step, so it neither
    synchronises the device nor makes a rank wait longer than the gradients' all-reduce does.

    All ranks construct it together.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._group = dist.new_group(backend="gloo") if comm.get_world_size() > 1 else None
        self._flag: torch.Tensor | None = None
        self._work: dist.Work | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Treat USR2, and TERM in a job that submitit started, as requests to stop.

        Processes forked within the context, such as a loader's workers, ignore USR2.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        numbers = [signal.SIGUSR2]
        if "SUBMITIT_EXECUTOR" in os.environ:
            numbers.append(signal.SIGTERM)
        usual = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether all ranks must stop now. Every rank calls this once after each step."""
        if self._group is None:
            return self.received is not None
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._flag.item())
        self._flag = torch.tensor([int(self.received is not None)])
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def close(self) -> None:
        """Wait for the pending all-reduce. All ranks call this after the same step."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def _ignore_in_fork() -> None:
    handler = signal.getsignal(signal.SIGUSR2)
    if isinstance(getattr(handler, "__self__", None), StopRequest):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


os.register_at_fork(after_in_child=_ignore_in_fork)
