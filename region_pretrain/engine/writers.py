"""What a run writes into its folder while it trains, and to the console."""

from __future__ import annotations

import csv
import datetime
import io
import logging
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError
from region_pretrain.files import write_atomic, write_text_atomic
from region_pretrain.metrics import newest_iteration, parse_line, read_metrics
from region_pretrain.progress import Progress, write_progress

logger = logging.getLogger(__name__)


def current_progress(storage: EventStorage, max_iter: int) -> Progress:
    """How far a run is at its newest log step; the time left follows from the last 20 log steps."""
    done = storage.latest()["total_loss"][1] + 1
    return Progress(done, max_iter, storage.history("time").avg(20) * (max_iter - done))


class ConsoleWriter(EventWriter):
    """One line: progress, losses, learning rate, speed, time spent waiting for data, time left.

    Args:
        max_iter: number of iterations of the run.
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
        """The line for the newest metrics of a storage."""
        value = {name: v for name, (v, _) in storage.latest().items()}
        progress = current_progress(storage, self._max_iter)
        losses = [f"{n} {v:.4g}" for n, v in value.items() if n.startswith("loss")]
        parts = [
            f"iter {progress.done}/{progress.total}",
            f"total_loss {value['total_loss']:.4g}",
            *([f"({', '.join(losses)})"] if len(losses) > 1 else []),
            f"lr {value['lr']:.4g}" if "lr" in value else "",
            f"{value['img_per_sec']:.1f} img/s",
            f"data {100 * value['data_time'] / max(value['time'], 1e-9):.0f}%",
        ]
        parts.append(f"eta {datetime.timedelta(seconds=int(progress.seconds_left))}")
        if "peak_memory_mib" in value:
            parts.append(f"max mem {value['peak_memory_mib']:.0f}M")
        return "  ".join(part for part in parts if part)


class ProgressWriter(EventWriter):
    """Keeps ``progress.json`` up to date, at most once per second.

    Args:
        path: the file; written at once, as an older one may be from before a resume.
        start_iter: first iteration of this process.
        max_iter: number of iterations of the run.
    """

    def __init__(self, path: str, start_iter: int, max_iter: int) -> None:
        self._path = path
        self._max_iter = max_iter
        self._written = start_iter
        self._written_at = -math.inf
        write_progress(path, Progress(start_iter, max_iter))

    def write(self) -> None:
        self._write(min_seconds=1.0)

    def close(self) -> None:
        self._write(min_seconds=0.0)

    def _write(self, min_seconds: float) -> None:
        storage = get_event_storage()
        if "total_loss" not in storage.latest():
            return
        progress, now = current_progress(storage, self._max_iter), time.monotonic()
        last = progress.done == self._max_iter
        if progress.done > self._written and (last or now - self._written_at >= min_seconds):
            write_progress(self._path, progress)
            self._written, self._written_at = progress.done, now


class RowWriter(EventWriter):
    """Writes each new value of a metric once, unsmoothed, as ``JSONWriter(window_size=1)`` does."""

    def __init__(self) -> None:
        self._newest = -1

    @abstractmethod
    def write_rows(self, rows: dict[int, dict[str, float]]) -> None:
        """Write metrics.

        Args:
            rows: iteration, in ascending order -> name -> value.
        """

    def write(self) -> None:
        rows: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest().items():
            if iteration > self._newest:
                rows.setdefault(iteration, {})[name] = value
        self._newest = max(rows, default=self._newest)
        self.write_rows(dict(sorted(rows.items())))


class CSVWriter(RowWriter):
    """``metrics.csv``: one line per logged iteration, one column per metric.

    It always has the content of ``metrics.json``: a new column, and the start of a run, which may
    resume an earlier checkpoint, rewrite it.

    Args:
        path: the file.
        metrics: ``metrics.json``, which another writer has written before.
    """

    def __init__(self, path: str, metrics: str) -> None:
        super().__init__()
        self._path = path
        self._metrics = metrics
        self._columns: list[str] = []
        if newest_iteration(metrics) >= 0:
            self._rewrite()
        elif PathManager.isfile(path):
            PathManager.rm(path)

    def write_rows(self, rows: dict[int, dict[str, float]]) -> None:
        if not rows:
            return
        if {name for row in rows.values() for name in row} <= set(self._columns):
            with PathManager.open(self._path, "a", newline="") as file:
                file.write(self._text({"iteration": i, **row} for i, row in rows.items()))
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        rows = read_metrics(self._metrics)
        names = {name for row in rows for name in row} - {"iteration"}
        self._columns = ["iteration", *sorted(names)]
        text = self._text([dict(zip(self._columns, self._columns, strict=True)), *rows])
        write_text_atomic(self._path, text)

    def _text(self, rows: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def drop_lines_from(path: str, iteration: int) -> None:
    """Remove from metrics.json what a run wrote after the checkpoint that it now resumes.

    Args:
        path: JSON lines; need not exist.
        iteration: lines of this and later iterations are removed, and so are damaged lines.

    Raises:
        UserError: it is not a file.
    """
    if not PathManager.exists(path):
        return
    if not PathManager.isfile(path):
        raise UserError(f"{path} is not a file: move it away, or choose another train.output_dir")
    with PathManager.open(path, "rb") as f:
        lines = f.readlines()
    kept = []
    for line in lines:
        row = parse_line(line)
        if row is None:
            logger.warning("%s: dropped a damaged line", path)
        elif row["iteration"] < iteration:
            kept.append(line.rstrip(b"\r\n") + b"\n")
    if kept != lines:
        write_atomic(path, lambda f: f.writelines(kept))
