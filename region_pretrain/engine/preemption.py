"""Stopping at a step boundary because a scheduler says so."""

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
    """A signal on any rank, heard by all of them at the same step.

    Every rank starts one all-reduce of its flag at each boundary and reads it at the next one. It
    runs among CPUs (a gloo group of its own) while the step is computed: no device is waited for,
    and no other rank beyond what the step's gradients wait for anyway.

    Built by all ranks together.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self._group = dist.new_group(backend="gloo") if comm.get_world_size() > 1 else None
        self._flag: torch.Tensor | None = None
        self._work: dist.Work | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Within the context USR2, and TERM where submitit started the job, are requests to stop.

        Processes that are forked in it, such as a loader's workers, ignore USR2.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread alone
            return
        numbers = [signal.SIGUSR2]
        if "SUBMITIT_EXECUTOR" in os.environ:
            numbers.append(signal.SIGTERM)
        usual = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        self.heard = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether all ranks shall stop at this boundary; each of them asks at each one."""
        if self._group is None:
            return self.heard is not None
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._flag.item())
        self._flag = torch.tensor([int(self.heard is not None)])
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def close(self) -> None:
        """Wait for what is under way; all ranks call it, after the same step."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def _ignore_in_fork() -> None:
    handler = signal.getsignal(signal.SIGUSR2)
    if isinstance(getattr(handler, "__self__", None), StopRequest):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


os.register_at_fork(after_in_child=_ignore_in_fork)
