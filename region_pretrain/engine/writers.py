"""What a run writes while it goes: a console line, metrics.json, TensorBoard events."""

from __future__ import annotations

import datetime
import json
import logging
import os

import torch
from detectron2.utils.events import (
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from detectron2.utils.file_io import PathManager

from region_pretrain.files import write_text_atomic

logger = logging.getLogger(__name__)


class ConsoleWriter(EventWriter):
    """One line: progress, losses, learning rate, speed, share of time spent waiting for data, ETA.

    Args:
        max_iter: the run's last iteration + 1.
    """

    def __init__(self, max_iter: int) -> None:
        self._max_iter = max_iter
        self._written = -1

    def write(self) -> None:
        storage = get_event_storage()
        latest = storage.latest()
        if "total_loss" not in latest or latest["total_loss"][1] <= self._written:
            return
        self._written = latest["total_loss"][1]
        logger.info(self.line(storage))

    def line(self, storage: EventStorage) -> str:
        """The line for the metrics that a storage holds now."""
        value = {name: v for name, (v, _) in storage.latest().items()}
        done = storage.latest()["total_loss"][1] + 1
        losses = [f"{n} {v:.4g}" for n, v in value.items() if n.startswith("loss")]
        parts = [
            f"iter {done}/{self._max_iter}",
            f"total_loss {value['total_loss']:.4g}",
            *([f"({', '.join(losses)})"] if len(losses) > 1 else []),
            f"lr {value['lr']:.4g}" if "lr" in value else "",
            f"{value['img_per_sec']:.1f} img/s",
            f"data {100 * value['data_time'] / max(value['time'], 1e-9):.0f}%",
        ]
        seconds = storage.history("time").avg(20) * (self._max_iter - done)
        parts.append(f"eta {datetime.timedelta(seconds=int(seconds))}")
        if torch.cuda.is_available():
            parts.append(f"max mem {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        return "  ".join(part for part in parts if part)


def drop_lines_from(path: str, iteration: int) -> None:
    """Take back what a run wrote to metrics.json after the checkpoint that it now resumes.

    Args:
        path: one JSON object a line; need not exist.
        iteration: lines of this iteration and later ones go, and a line cut short by a kill.
    """
    if not PathManager.exists(path):
        return
    with PathManager.open(path) as f:
        lines = f.readlines()
    kept = []
    for line in lines:
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line.rstrip("\n") + "\n")
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: dropped an incomplete line", path)
    if kept != lines:
        write_text_atomic(path, "".join(kept))


def build_writers(output_dir: str, start_iter: int, max_iter: int) -> list[EventWriter]:
    """The writers of a run that starts, or goes on, at ``start_iter``; for the main process.

    Values are written as they were measured, without smoothing over earlier ones, so that a
    resumed run writes the same.
    """
    metrics = os.path.join(output_dir, "metrics.json")
    drop_lines_from(metrics, start_iter)
    return [
        ConsoleWriter(max_iter),
        JSONWriter(metrics, window_size=1),
        TensorboardXWriter(output_dir, window_size=1, purge_step=start_iter),
    ]
