"""``train.writers``: the writers of a run, from their names or lazy objects."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from detectron2.config import instantiate
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from omegaconf import DictConfig, ListConfig

from region_pretrain.config import read_saved
from region_pretrain.engine.tracker import TrackerWriter
from region_pretrain.engine.writers import (
    ConsoleWriter,
    CSVWriter,
    ProgressWriter,
    drop_lines_from,
)
from region_pretrain.errors import UserError, describe, did_you_mean
from region_pretrain.metrics import logged_rows, newest_iteration
from region_pretrain.progress import PROGRESS_FILE
from region_pretrain.random_state import random_state_kept
from region_pretrain.tracking.git import git_state
from region_pretrain.tracking.service import SERVICES, RunInfo, check_package, read_tracked

logger = logging.getLogger(__name__)

NAMES = ("console", "json", "tensorboard", "csv", *SERVICES)
_LONGEST_TAG = 64  # Weights & Biases refuses longer ones


def check_writers(train: DictConfig) -> None:
    """Check ``train.writers`` and ``train.tracking`` before anything is loaded.

    Raises:
        UserError: an unknown name, a package that is not installed, no ``json``, or tags that the
            services would refuse.
    """
    writers = train.writers
    for entry in writers:
        if isinstance(entry, str) and entry not in NAMES:
            hint = did_you_mean(entry, NAMES, otherwise=".")
            raise UserError(
                f"train.writers: there is no writer {entry!r}{hint} The names are "
                f"{', '.join(NAMES)}; any other writer is a L(Writer)(...)"
            )
        if not isinstance(entry, str) and "_target_" not in entry:
            raise UserError(f"train.writers: {entry} is neither a name nor a L(Writer)(...)")
        if entry in SERVICES:
            check_package(entry)
    if "json" not in writers:
        raise UserError("train.writers must contain json: resuming and reports need metrics.json")
    tags = train.tracking.tags
    listed = tags is None or isinstance(tags, list | tuple | ListConfig)
    if not listed or not all(isinstance(t, str) and 0 < len(t) <= _LONGEST_TAG for t in tags or ()):
        raise UserError(
            f"train.tracking.tags={tags}: a list of texts of 1 to {_LONGEST_TAG} characters is "
            "needed, e.g. ['first', 'long']"
        )


def build_writers(cfg: DictConfig, start_iter: int, max_iter: int) -> list[EventWriter]:
    """The writers of a run that starts or resumes at ``start_iter``; for the main process.

    Values are not smoothed over earlier ones, so that a resumed run writes the same values.

    Args:
        cfg: saved in ``train.output_dir``; ``train.writers`` and ``train.tracking`` are read.
        start_iter: first iteration; later ones are removed from the files in the folder.
        max_iter: number of iterations of the run.

    Raises:
        UserError: a service's settings are unusable, or a file cannot be replaced.
    """
    folder = cfg.train.output_dir
    metrics = os.path.join(folder, "metrics.json")
    logged = newest_iteration(metrics)
    drop_lines_from(metrics, start_iter)
    makers: dict[str, Callable[[], EventWriter]] = {
        "json": lambda: JSONWriter(metrics, window_size=1),
        "console": lambda: ConsoleWriter(max_iter),
        "csv": lambda: CSVWriter(os.path.join(folder, "metrics.csv"), metrics),
    }
    writers = [makers[name]() for name in makers if name in cfg.train.writers]
    trackers = [
        TrackerWriter(name, _run_info(cfg, name, logged), max_iter)
        for name in SERVICES
        if name in cfg.train.writers
    ]
    for tracker in trackers:
        tracker.wait_until_ready()
    writers += trackers
    others = [entry for entry in cfg.train.writers if not isinstance(entry, str)]
    with random_state_kept():  # a resumed run makes them again
        writers += [_Tolerant(instantiate(entry)) for entry in others]
    writers.append(ProgressWriter(os.path.join(folder, PROGRESS_FILE), start_iter, max_iter))
    if "tensorboard" in cfg.train.writers:  # last, as it removes pictures from the storage
        writers.append(TensorboardXWriter(folder, window_size=1, purge_step=start_iter))
    return writers


def _run_info(cfg: DictConfig, service: str, logged: int) -> RunInfo:
    folder, tracking = os.path.abspath(cfg.train.output_dir), cfg.train.tracking
    path = os.path.join(folder, "config.yaml")
    history = {}
    for row in logged_rows(folder):
        history[row.pop("iteration")] = row
    with open(path, encoding="utf-8") as file:
        text = file.read()
    return RunInfo(
        output_dir=folder,
        project=tracking.project,
        name=tracking.name or os.path.basename(folder),
        group=tracking.group,
        tags=tuple(tracking.tags or ()),
        config=read_saved(path),
        config_text=text,
        git=git_state(),
        upload_model=tracking.upload_model,
        history=history,
        logged=logged if service in read_tracked(folder) else -1,
        seconds=tracking.seconds,
        pid=os.getpid(),
    )


class _Tolerant(EventWriter):
    """A writer whose errors and random numbers have no effect on the training."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._failed = False

    def write(self) -> None:
        self._try(self._writer.write)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, function: Callable[[], None]) -> None:
        try:
            with random_state_kept():
                function()
        except Exception as error:
            if not self._failed:
                logger.warning(
                    "%s failed: %s. The training continues; there is no further warning",
                    type(self._writer).__name__,
                    describe(error),
                )
            self._failed = True
