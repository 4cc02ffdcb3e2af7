"""What a sweep has found so far: numbers out of its runs' folders."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from region_pretrain.errors import UserError
from region_pretrain.metrics import read_metrics, read_results
from region_pretrain.reporting.plots import Curve
from region_pretrain.reporting.summary import mean_std
from region_pretrain.sweeps import state
from region_pretrain.sweeps.choice import read_choice
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, TRIAL, Run
from region_pretrain.sweeps.state import SweepFile

#: ``task/metric`` of ``results.json`` -> heading.
METRICS = {
    f"{task}/{metric}": f"{name} {metric}"
    for task, name in (("bbox", "box"), ("segm", "mask"))
    for metric in ("AP", "AP50", "AP75")
}
#: What makes a row, besides the start.
_ROW = ("finetune", "label_fraction", "checkpoint")


@dataclass
class Row:
    """One start, fine-tuned in one way, over its seeds.

    Attributes:
        init: its name in the sweep's file.
        label: what tables call it.
        finetune, label_fraction, checkpoint: of the fine-tuning.
        seeds: how many fine-tunings are finished.
        wanted: how many there will be.
        rate: chosen learning rate, as it is written; None: not yet, or the config's.
        rates: rate -> metric on the held-out split, of the trials that are finished.
        metrics: key of :data:`METRICS` -> mean and standard deviation over the finished seeds.
        curves: key -> mean of the seeds by iteration, where all of them have the point.
        images_per_second, memory_mib, minutes: of the pre-training, means over its seeds; None: it
            has none, or nothing is logged yet. Minutes are those of its steps.
    """

    init: str
    label: str
    finetune: str
    label_fraction: float
    checkpoint: str | int
    seeds: int = 0
    wanted: int = 0
    rate: str | None = None
    rates: dict[str, float | None] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    images_per_second: float | None = None
    memory_mib: float | None = None
    minutes: float | None = None


def collect(sweep: SweepFile) -> list[Row]:
    """The rows of the table, in the order of the sweep's file."""
    runs, entries = sweep.plan.runs, sweep.plan.entries
    rows: dict[tuple, Row] = {}
    for entry in entries:
        if entry["kind"] == FINETUNE:
            key = (*(entry[name] for name in _ROW), entry["init"])
            where = {name: entry[name] for name in _ROW}
            row = Row(entry["init"], sweep.labels[entry["init"]], **where)
            rows.setdefault(key, row).wanted += 1
    order = list(sweep.labels)
    for row in rows.values():
        mine = [e for e in entries if all(e.get(k) == getattr(row, k) for k in ("init", *_ROW))]
        for entry in mine:
            run = runs[entry["run"]]
            if not state.is_finished(run):
                continue
            if entry["kind"] == CHOICE:
                row.rate = read_choice(run.product)
            elif entry["kind"] == TRIAL:
                row.rates[f"{entry['learning_rate']:g}"] = _value(run, entry["metric"])
        _fill(row, [runs[e["run"]] for e in mine if e["kind"] == FINETUNE])
        pretrained = [
            runs[e["run"]] for e in entries if (e["kind"], e.get("init")) == (PRETRAIN, row.init)
        ]
        _fill_cost(row, pretrained)
    return sorted(
        rows.values(),
        key=lambda r: (r.finetune, -r.label_fraction, order.index(r.init), _last(r.checkpoint)),
    )


def _last(checkpoint: str | int) -> float:
    return checkpoint if isinstance(checkpoint, int) else float("inf")


def _value(run: Run, key: str) -> float | None:
    task, metric = key.split("/")
    # A detector that finds nothing at all has no entry.
    return read_results(run.product).get(task, {}).get(metric)


def _fill(row: Row, runs: Sequence[Run]) -> None:
    done = [run for run in runs if state.is_finished(run)]
    row.seeds = len(done)
    row.metrics = {key: mean_std([_value(run, key) for run in done]) for key in METRICS}
    metrics = [rows for run in runs if (rows := logged(run))]
    row.curves = {key: mean_curve([_points(rows, key) for rows in metrics]) for key in METRICS}


def logged(run: Run) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.json``; none where it has not logged yet."""
    try:
        return read_metrics(os.path.join(run.folder, "metrics.json"))
    except UserError:
        return []


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {row["iteration"] + 1: row[key] for row in rows if key in row}


def mean_curve(curves: Sequence[Mapping[int, float]]) -> Curve:
    """The mean of several curves at the points that all of them have."""
    shared = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    return shared, [statistics.fmean(c[x] for c in curves) for x in shared]


def step_minutes(rows: Sequence[Mapping[str, Any]]) -> float:
    """Minutes of a run's steps: loading and computing, without start, evaluation and checkpoints.

    Args:
        rows: of ``metrics.json``; ``time`` is the mean seconds of a step since the row before.
    """
    timed = [row for row in rows if "time" in row]
    before = [-1, *(row["iteration"] for row in timed)]
    pairs = zip(timed, before, strict=False)
    return sum(row["time"] * (row["iteration"] - last) for row, last in pairs) / 60


def _fill_cost(row: Row, runs: Sequence[Run]) -> None:
    metrics = [rows for run in runs if (rows := logged(run))]
    if not metrics:
        return
    speeds = [[r["img_per_sec"] for r in rows if "img_per_sec" in r] for rows in metrics]
    memory = [[r["peak_memory_mib"] for r in rows if "peak_memory_mib" in r] for rows in metrics]
    if all(speeds):
        row.images_per_second = statistics.fmean(statistics.median(s) for s in speeds)
    if all(memory):
        row.memory_mib = max(max(m) for m in memory)
    row.minutes = statistics.fmean(step_minutes(rows) for rows in metrics)
