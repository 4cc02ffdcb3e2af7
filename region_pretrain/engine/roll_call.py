"""The rendezvous of a run's processes, which says whom it waits for and who never came.

PyTorch's own waits in silence for half an hour and then ends with a traceback.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from detectron2.engine import DEFAULT_TIMEOUT
from torch.distributed import DistError, Store, TCPStore

from region_pretrain.errors import KILLED, UserError

_PATIENCE_SECONDS = DEFAULT_TIMEOUT.total_seconds()
_QUIET_SECONDS = 10.0  # before the first message; the others follow once per minute
_REPEAT_SECONDS = 60.0
_FAREWELL_SECONDS = 2.0  # for the others to learn that the wait is over
_POLL_SECONDS = 0.2
_ALL, _OVER = "all", "over"


class PortInUse(UserError):
    """Rank 0 cannot listen. SLURM requeues the job, and its next attempt has another port."""

    exit_code = KILLED


def meet(host: str, port: int, rank: int, world_size: int, speaks: bool = True) -> TCPStore:
    """Wait until all processes have called this.

    Args:
        host, port: where rank 0 listens.
        rank: of this process.
        world_size: number of processes.
        speaks: whether this process prints whom it waits for.

    Returns:
        The store, for ``init_process_group``.

    Raises:
        UserError: processes are missing after half an hour; the message names them. Or rank 0
            cannot listen (:class:`PortInUse` on SLURM), or two processes have the same rank.
    """
    wait = _Wait(f"{host}:{port}", rank, world_size, speaks)
    store = _listen(port, world_size) if rank == 0 else _connect(host, port, world_size, wait)
    missing: Sequence[int] = range(world_size)
    try:
        if store.add(_key(rank), 1) > 1:
            raise UserError(
                f"two processes have rank {rank} of {world_size}: give each machine its own "
                "--machine-rank"
            )
        if store.add("count", 1) == world_size:
            store.set(_ALL, "")
        while not store.check([_ALL]):
            over = store.check([_OVER])
            if over or wait.is_over() or wait.is_message_due():
                missing = [r for r in range(world_size) if not store.check([_key(r)])]
                if over or wait.is_over():
                    store.set(_OVER, "")
                    time.sleep(_FAREWELL_SECONDS)
                    raise wait.error(missing)
                wait.say(missing)
            time.sleep(_POLL_SECONDS)
    except DistError:
        raise wait.error([r for r in missing if r != rank]) from None
    wait.end()
    return store


def agree_on_device(store: Store, rank: int, world_size: int, device: str) -> None:
    """Check that all processes train on GPUs, or all on the CPU.

    Otherwise they would choose different backends, and wait for each other for half an hour.

    Args:
        store: that of :func:`meet`; all processes call this together.
        rank: of this process.
        world_size: number of processes.
        device: ``cuda`` or ``cpu``.

    Raises:
        UserError: they do not; the message names the machines without a GPU.
    """
    store.set(f"device {rank}", f"{device}/{socket.gethostname()}")
    values = store.multi_get([f"device {r}" for r in range(world_size)])
    found = [value.decode().split("/", 1) for value in values]
    if len({device for device, _ in found}) == 1:
        return
    if rank == 0:  # the store ends with this process
        time.sleep(_FAREWELL_SECONDS)
    hosts = ", ".join(sorted({host for device, host in found if device == "cpu"}))
    raise UserError(
        f"processes on {hosts} would train on the CPU, and the others on GPUs: check that PyTorch "
        "finds the GPUs there (nvidia-smi), leave out a damaged machine (--slurm exclude=NODE), or "
        "set train.device=cpu on all"
    )


def _key(rank: int) -> str:
    return f"rank {rank}"


def _listen(port: int, world_size: int) -> TCPStore:
    try:
        # It listens on all interfaces, and connects to itself through the one named here.
        return TCPStore(
            "localhost", port, world_size, True, DEFAULT_TIMEOUT, wait_for_workers=False
        )
    except DistError as error:
        text = f"rank 0 cannot listen on port {port}: {str(error).rpartition('message: ')[2]}"
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            raise PortInUse(f"{text}; the job is to be started again") from None
        raise UserError(f"{text}; choose another") from None


def _connect(host: str, port: int, world_size: int, wait: _Wait) -> TCPStore:
    # PyTorch would log each attempt.
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if wait.is_over():
                raise wait.error([0], f": {error.strerror or error}") from None
        else:
            break
        if wait.is_message_due():
            wait.say([0])
        time.sleep(_POLL_SECONDS)
    return TCPStore(host, port, world_size, False, timedelta(seconds=_PATIENCE_SECONDS))


class _Wait:
    """How long a process has been waiting, and what it says about that."""

    def __init__(self, address: str, rank: int, world_size: int, speaks: bool) -> None:
        self._address, self._rank, self._world_size = address, rank, world_size
        self._began = time.monotonic()
        self._due = self._began + _QUIET_SECONDS if speaks else float("inf")
        self._spoke = False

    def is_over(self) -> bool:
        return time.monotonic() - self._began > _PATIENCE_SECONDS

    def is_message_due(self) -> bool:
        return time.monotonic() >= self._due

    def say(self, missing: Sequence[int]) -> None:
        self._spoke, self._due = True, time.monotonic() + _REPEAT_SECONDS
        _print(
            f"rank {self._rank} of {self._world_size} is waiting at {self._address} for "
            f"{_names(missing)}: {time.monotonic() - self._began:.0f} of at most "
            f"{_PATIENCE_SECONDS:.0f} s"
        )

    def end(self) -> None:
        if self._spoke:
            seconds = time.monotonic() - self._began
            _print(f"all {self._world_size} processes are here after {seconds:.0f} s")

    def error(self, missing: Sequence[int], reason: str = "") -> UserError:
        return UserError(
            f"{_names(missing)} of {self._world_size} did not connect to {self._address} within "
            f"{time.monotonic() - self._began:.0f} s{reason}: check that every machine runs the "
            "command, sees its log, and can reach this address"
        )


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # logging starts later, in the run's output folder


def _names(ranks: Sequence[int]) -> str:
    """``rank 1``, or ``ranks 1, 3-7``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} {', '.join('-'.join(map(str, p)) for p in parts)}"
