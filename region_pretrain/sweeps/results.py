"""The results of a sweep so far, read from the folders of its runs."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from region_pretrain.config import load_file
from region_pretrain.errors import UserError
from region_pretrain.metrics import read_metrics, read_results
from region_pretrain.reporting.plots import Curve, metric_curve
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
#: What identifies a row, in addition to the initialisation.
_ROW = ("finetune", "label_fraction", "checkpoint")
_PROBE = "probe/"

Statistics = dict[str, float | None]  # result of mean_std


@dataclass
class Row:
    """One initialisation, fine-tuned in one way, over its seeds.

    Attributes:
        init: name of the initialisation in the sweep.
        label: its name in tables.
        finetune, label_fraction, checkpoint: how it is fine-tuned.
        seeds: number of finished fine-tunings.
        wanted: number of planned fine-tunings.
        learning_rate: the chosen or configured learning rate as text; None if not known yet.
        trials: learning rate -> metric on the held-out split, for the finished trials.
        by_seed: seed -> key of :data:`METRICS` -> value, None if the detector found nothing.
        metrics: key of :data:`METRICS` -> mean and standard deviation over the finished seeds.
        baseline: label of the initialisation that the differences refer to; empty: none.
        shared_seeds: number of seeds that this row and the baseline have both finished.
        differences: key of :data:`METRICS` -> mean and standard deviation of the paired differences
            to the baseline over these seeds.
        curves: key of :data:`METRICS` -> mean over the seeds by iteration, at the points that all
            of them have.
        images_per_second, memory_mib, minutes: cost of the pre-training, means over its seeds (the
            memory is the maximum); None if there is no pre-training or nothing is logged yet.
            Minutes are those of its steps.
    """

    init: str
    label: str
    finetune: str
    label_fraction: float
    checkpoint: str | int
    seeds: int = 0
    wanted: int = 0
    learning_rate: str | None = None
    trials: dict[str, float | None] = field(default_factory=dict)
    by_seed: dict[int, dict[str, float | None]] = field(default_factory=dict)
    metrics: dict[str, Statistics] = field(default_factory=dict)
    baseline: str = ""
    shared_seeds: int = 0
    differences: dict[str, Statistics] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    images_per_second: float | None = None
    memory_mib: float | None = None
    minutes: float | None = None


def collect(sweep: SweepFile) -> list[Row]:
    """The rows of the results: by fine-tuning, label fraction, initialisation and checkpoint."""
    runs = sweep.plan.runs
    groups: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in sweep.plan.entries:
        if entry["kind"] in (FINETUNE, TRIAL, CHOICE):
            groups[tuple(entry[key] for key in ("init", *_ROW))].append(entry)
    pretrained = pretrainings(sweep)
    rows = []
    for (init, *how), entries in groups.items():
        row = Row(init, sweep.labels[init], *how)
        _fill(row, entries, runs)
        _fill_cost(row, list(pretrained.get(init, {}).values()))
        rows.append(row)
    _compare(rows, next((init for init in sweep.labels if init not in pretrained), None))
    order = list(sweep.labels)
    return sorted(
        rows,
        key=lambda r: (r.finetune, -r.label_fraction, order.index(r.init), _last(r.checkpoint)),
    )


def pretrainings(sweep: SweepFile) -> dict[str, dict[int, Run]]:
    """Initialisation -> seed -> its pre-training."""
    found: dict[str, dict[int, Run]] = {}
    for entry in sweep.plan.entries:
        if entry["kind"] == PRETRAIN:
            found.setdefault(entry["init"], {})[entry["seed"]] = sweep.plan.runs[entry["run"]]
    return found


def collect_probes(sweep: SweepFile) -> dict[str, dict[str, tuple[Statistics, Statistics]]]:
    """The probes that the pre-trainings have logged so far.

    Returns:
        Initialisation -> metric (``probe/...``) -> its first and its last value, each as mean and
        standard deviation over the seeds that have logged it, in percent.
    """
    found = {}
    for init, by_seed in pretrainings(sweep).items():
        values = defaultdict(list)
        for run in by_seed.values():
            rows = logged(run)
            for key in dict.fromkeys(k for row in rows for k in row if k.startswith(_PROBE)):
                values[key].append(metric_curve(rows, key)[1])
        found[init] = {
            key: tuple(mean_std([100 * curve[at] for curve in curves]) for at in (0, -1))
            for key, curves in values.items()
        }
    return {init: probes for init, probes in found.items() if probes}


def logged(run: Run) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.json``; none if it has not logged yet."""
    try:
        return read_metrics(os.path.join(run.folder, "metrics.json"))
    except UserError:
        return []


def _last(checkpoint: str | int) -> float:
    return checkpoint if isinstance(checkpoint, int) else float("inf")


def _value(run: Run, key: str) -> float | None:
    task, metric = key.split("/")
    # Tasks in which the detector found nothing have no entry.
    return read_results(run.product).get(task, {}).get(metric)


def _fill(row: Row, entries: Sequence[Mapping[str, Any]], runs: Mapping[str, Run]) -> None:
    finetunings = {e["seed"]: runs[e["run"]] for e in entries if e["kind"] == FINETUNE}
    for entry in entries:
        run = runs[entry["run"]]
        if entry["kind"] == CHOICE and state.is_finished(run):
            row.learning_rate = read_choice(run.product)
        elif entry["kind"] == TRIAL and state.is_finished(run):
            row.trials[f"{entry['learning_rate']:g}"] = _value(run, entry["metric"])
    if not any(entry["kind"] == CHOICE for entry in entries):
        row.learning_rate = _configured_learning_rate(list(finetunings.values()))
    row.by_seed = {
        seed: {key: _value(run, key) for key in METRICS}
        for seed, run in finetunings.items()
        if state.is_finished(run)
    }
    row.seeds, row.wanted = len(row.by_seed), len(finetunings)
    row.metrics = {key: mean_std([v[key] for v in row.by_seed.values()]) for key in METRICS}
    metrics = [rows for run in finetunings.values() if (rows := logged(run))]
    row.curves = {key: mean_curve([metric_curve(rows, key) for rows in metrics]) for key in METRICS}


def _configured_learning_rate(runs: Sequence[Run]) -> str | None:
    """``optimizer.lr`` of the first run that has written its config."""
    for run in runs:
        path = os.path.join(run.folder, "config.yaml")
        if os.path.isfile(path):
            return f"{load_file(path).optimizer.lr:g}"
    return None


def _compare(rows: Sequence[Row], baseline: str | None) -> None:
    """Fill in the differences to a baseline's row of the same fine-tuning and label fraction."""
    bases = {(row.finetune, row.label_fraction): row for row in rows if row.init == baseline}
    for row in rows:
        base = bases.get((row.finetune, row.label_fraction))
        if base is None or base is row:
            continue
        pairs = [
            (values, base.by_seed[s]) for s, values in row.by_seed.items() if s in base.by_seed
        ]
        row.baseline, row.shared_seeds = base.label, len(pairs)
        row.differences = {
            key: mean_std([None if None in (a[key], b[key]) else a[key] - b[key] for a, b in pairs])
            for key in METRICS
        }


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves, at the x values that all of them have."""
    by_x = [dict(zip(*curve, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*map(set, by_x))) if by_x else []
    return shared, [statistics.fmean(curve[x] for curve in by_x) for x in shared]


def step_minutes(rows: Sequence[Mapping[str, Any]]) -> float:
    """Minutes of a run's steps: without start-up, evaluation and checkpoints.

    Args:
        rows: lines of ``metrics.json``; ``time`` is the mean seconds per step since the line
            before.
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
