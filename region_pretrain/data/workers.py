"""Worker processes of a loader, and the shared memory through which they pass batches."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing import get_start_method
from types import TracebackType
from typing import Any, TypeVar

import cv2
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from region_pretrain.system import USR2, one_opencv_thread

_PREFETCH_FACTOR = 2  # DataLoader's default: batches that each worker prepares ahead
T = TypeVar("T")


def init_worker(_: int) -> None:
    """Use one OpenCV thread, and leave signals to the training process.

    SLURM sends them to every process of a job, ``timeout`` and systemd to every process of a run.
    If a worker exited on SIGTERM, the training process would fail before it has saved a checkpoint.
    Workers exit with their loader. If the training process ends while it receives a tensor, it says
    why; the traceback of the worker that sends it would bury that.
    """
    cv2.setNumThreads(0)
    sys.excepthook = _print_unless_reader_left
    in_job = "SUBMITIT_EXECUTOR" in os.environ
    spawned = get_start_method() != "fork"
    # Forked while a run listens to signals, a worker ignores them already.
    if in_job or spawned or signal.getsignal(USR2) == signal.SIG_IGN:
        for number in (USR2, signal.SIGTERM, signal.SIGINT if spawned else None):
            if number is not None:
                signal.signal(number, signal.SIG_IGN)


def _print_unless_reader_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """For the thread that sends tensors; other errors of a worker reach the training process."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def share(batch: T) -> T:
    """Move a worker's batch to shared memory.

    PyTorch would do so in a thread that loses errors, and the training process would wait forever
    for a batch that did not fit. An error raised here reaches it.
    """
    if get_worker_info() is not None:
        for tensor in _tensors(batch):
            tensor.share_memory_()
    return batch


def share_batches_of(loader: DataLoader) -> None:
    """Apply :func:`share` to each batch of a loader that has not started yet.

    A loader that is no ``DataLoader`` is left unchanged.
    """
    if not isinstance(loader, DataLoader):
        return
    loader.collate_fn = partial(_collate_and_share, loader.collate_fn)


def _collate_and_share(collate: Callable[[list[Any]], T], samples: list[Any]) -> T:
    return share(collate(samples))


def prefetched_bytes(load_one: Callable[[], Any], batch_size: int, num_workers: int) -> int:
    """Shared memory that the batches of one loader occupy at most.

    Args:
        load_one: loads a batch of one image; called once, and only if there are workers.
        batch_size: images per batch of this process.
        num_workers: worker processes of this process.

    Returns:
        Bytes: all batches that the workers prepare ahead, and the one that is being trained on.
    """
    if not num_workers:
        return 0
    with one_opencv_thread():  # as in a worker, which is forked without OpenCV's other threads
        size = sum(t.numel() * t.element_size() for t in _tensors(load_one()))
    return size * batch_size * (_PREFETCH_FACTOR * num_workers + 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested containers and objects, such as Detectron2's ``Instances``, once."""
    waiting, seen = [batch], {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting.append(vars(value))
