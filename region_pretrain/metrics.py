"""The metrics and results in a run's output folder: ``metrics.json`` and ``results.json``."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError
from region_pretrain.json_files import read_json

#: task -> metric -> percent; None where undefined, e.g. the AP of a class without boxes.
Results = dict[str, dict[str, float | None]]
#: The task in the results of a training that diverged, which has no other.
DIVERGED = "diverged"


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Read a run's ``metrics.json``.

    Lines of the same iteration (training and evaluation log separately) are merged. Damaged lines
    are skipped, such as an incomplete last line, left by a killed run.

    Args:
        path: the file, or the run's output folder.

    Returns:
        One dict per logged iteration, with key ``iteration``, in ascending order.

    Raises:
        UserError: there is no such file, or it has no metrics.
    """
    if not path.endswith(".json"):
        path = os.path.join(path, "metrics.json")
    if not PathManager.isfile(path):
        raise UserError(f"there is no {path}: expected a run's output folder or its metrics.json")
    rows: dict[int, dict[str, Any]] = {}
    with PathManager.open(path, "rb") as f:
        for line in f:
            row = parse_line(line)
            if row is not None:
                rows[row["iteration"]] = rows.get(row["iteration"], {}) | row
    if not rows:
        raise UserError(f"{path} has no metrics")
    return [rows[iteration] for iteration in sorted(rows)]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line of ``metrics.json``; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("iteration")) is int else None


def logged_rows(path: str) -> list[dict[str, Any]]:
    """As :func:`read_metrics`; none if the run has logged none."""
    try:
        return read_metrics(path)
    except UserError:
        return []


def newest_metrics(path: str) -> dict[str, float]:
    """The newest value of every metric of a run; empty if the run has logged none.

    Args:
        path: as for :func:`read_metrics`.
    """
    return {key: value for row in logged_rows(path) for key, value in row.items()}


def newest_iteration(path: str, before: float = math.inf) -> int:
    """The last logged iteration, or the last one before another; -1 if there is none.

    Args:
        path: as for :func:`read_metrics`.
        before: lines of this and later iterations do not count.
    """
    iterations = (row["iteration"] for row in logged_rows(path))
    return max((iteration for iteration in iterations if iteration < before), default=-1)


def read_results(path: str) -> Results:
    """Read the final metrics of a fine-tuning run.

    Args:
        path: a ``results.json``, or the run's output folder.

    Returns:
        Task (``bbox``, ``segm``) -> metric (``AP``, ``AP50``, ...) -> percent. A task without a
        single detection is missing.

    Raises:
        FileNotFoundError: the run is not finished.
        UserError: the file is damaged.
    """
    if not path.endswith(".json"):
        path = os.path.join(path, "results.json")
    fix = "delete it and continue the run with --resume, which evaluates its model again"
    return read_json(PathManager.get_local_path(path), Results, fix)
