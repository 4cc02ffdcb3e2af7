"""Long runs of cheap steps that measure their memory, descriptors and threads."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from fault_runs import processes_of
from forked import Process
from omegaconf import DictConfig
from tabulate import tabulate
from tiny_run import make_config, make_detection_config

from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.system import resident_mib

SAMPLES = 10


class Watch(HookBase):
    """Writes the numbers of this process to a file, ten times in a run."""

    def __init__(self, path: str):
        self._path = path

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % (self.trainer.max_iter // SAMPLES):
            return
        gc.collect()
        pids = set(map(str, processes_of(os.getsid(0))))
        shared = [name for name in os.listdir("/dev/shm") if pids.intersection(name.split("_"))]
        numbers = (
            resident_mib(),
            sys.getallocatedblocks(),
            len(os.listdir("/proc/self/fd")),
            threads(),
            len(shared),
        )
        with open(self._path, "a") as file:
            print(*numbers, file=file)


def threads() -> int:
    """The usual number of threads: that of the lease starts a short one now and then."""
    counts = []
    for _ in range(3):
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.001)
    return min(counts)


def watch(cfg: DictConfig, folder: Path, steps: int) -> list[list[float]]:
    """Run a config.

    Returns:
        MiB, Python's allocated blocks, descriptors, threads and files in ``/dev/shm`` after each
        tenth of the run.
    """
    train, numbers = cfg.train, folder / "numbers"
    train.output_dir, train.max_iter, train.log_period = str(folder / "run"), steps, 2
    train.hooks = [L(Watch)(path=str(numbers))]
    train.checkpointer = {"period": steps // 20, "max_to_keep": 2}
    do = do_train if "evaluator" in cfg.dataloader else do_pretrain
    process = Process(lambda: do(cfg), folder / "out")
    assert process.wait(3600) == 0, (folder / "out").read_text()[-3000:]
    rows = [list(map(float, line.split())) for line in numbers.read_text().splitlines()]
    assert len(rows) == SAMPLES
    return rows


def tiny_pretraining(folder: Path, steps: int) -> DictConfig:
    return make_config(folder)


def tiny_finetuning(folder: Path, steps: int) -> DictConfig:
    """With ten evaluations."""
    return make_detection_config(folder, eval_period=steps // 10)


def assert_flat(rows: Sequence[Sequence[float]], prefetched: int = 0) -> None:
    """Nothing grows in the second half of a run.

    Args:
        rows: result of :func:`watch`.
        prefetched: descriptors and shared files of the batches that may be waiting.
    """
    resident, blocks, files, running, shared = map(list, zip(*rows, strict=True))
    half = SAMPLES // 2
    assert resident[-1] - resident[half] < 8, rows
    # One more entry per logged step and metric would be thousands.
    assert blocks[-1] - blocks[half] < 1000, rows
    assert max(files[half:]) - min(files[half:]) <= prefetched, rows
    assert max(running[half:]) == min(running[half:]), rows
    assert max(shared) <= prefetched, rows


def describe_flat(rows: Sequence[Sequence[float]]) -> str:
    """The numbers after each tenth of a run."""
    header = ["MiB", "Python's blocks", "descriptors", "threads", "/dev/shm"]
    return tabulate(rows, header, floatfmt=".0f")
