"""Which probe of a checkpoint predicts its AP after fine-tuning."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from scipy.stats import spearmanr
from tabulate import tabulate
from tqdm import tqdm

from region_pretrain.config import load_config
from region_pretrain.errors import UserError
from region_pretrain.evaluation.probe import PROBE_FILE, do_probe
from region_pretrain.json_files import read_json
from region_pretrain.metrics import logged_rows
from region_pretrain.sweeps import state
from region_pretrain.sweeps.graph import FINETUNE, Run, config_of
from region_pretrain.sweeps.results import step_minutes, value_of
from region_pretrain.sweeps.rows import METRICS
from region_pretrain.sweeps.state import SweepFile

_LABELS = ("initialisation", "pretrain_seed", "checkpoint", "label_fraction")


@dataclass
class ProbedCheckpoint:
    """A pre-training's checkpoint.

    Attributes:
        labels: initialisation, pre-training seed, checkpoint and label fraction.
        ap: mean over the fine-tuning seeds.
        probes: name of the probe -> value.
        seconds: name of the probe -> its cost in seconds.
    """

    labels: tuple[Any, ...]
    ap: float
    probes: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def probe_checkpoints(
    folder: str, finetune: str | None = None, metric: str = "bbox/AP"
) -> list[ProbedCheckpoint]:
    """Probe every pre-training of a sweep that has been fine-tuned with all seeds.

    The probes are those of ``tools/probe.py`` on the data of the fine-tuning, and the sweep's other
    fine-tunings, such as a short one with a frozen trunk. Finished probes, in the sweep's folder
    ``probes``, are not repeated, unless their fine-tuning has been since. Relative paths refer to
    the folder that the sweep was started in.

    Args:
        folder: the sweep's output folder.
        finetune: the fine-tuning that is predicted; None: the sweep's first one.
        metric: a key of :data:`~region_pretrain.sweeps.rows.METRICS`.

    Raises:
        UserError: unknown metric; the sweep has no such fine-tuning, or no finished one of a
            pre-training.
    """
    if metric not in METRICS:
        raise UserError(f"no metric {metric!r}; known: {', '.join(METRICS)}")
    folder = os.path.abspath(folder)
    sweep = state.read_sweep(folder)
    groups = _finetunings(sweep)
    names = list(dict.fromkeys(name for name, _ in groups))
    finetune = finetune or next(iter(names), None)
    if not names:
        raise UserError(f"the sweep in {folder} has no fine-tuning, whose AP a probe could predict")
    if finetune not in names:
        raise UserError(f"no fine-tuning {finetune!r} in {folder}; it has {', '.join(names)}")
    measured = {
        labels: (runs[0], ap)
        for (name, labels), runs in groups.items()
        if name == finetune and (ap := _mean(runs, metric)) is not None
    }
    found = []
    for labels, (run, ap) in tqdm(measured.items(), desc="probes", unit="checkpoint"):
        checkpoint = ProbedCheckpoint(labels, ap)
        with _inside(sweep.cwd):
            _add_probe(checkpoint, _probe(run, folder, sweep.configs))
        for other in names:
            others = groups.get((other, labels), []) if other != finetune else []
            value = _mean(others, metric)
            if value is not None:
                checkpoint.probes[other] = value
                checkpoint.seconds[other] = statistics.fmean(
                    60 * step_minutes(logged_rows(run.folder)) for run in others
                )
        found.append(checkpoint)
    if not found:
        raise UserError(f"no pre-training of {folder} has been fine-tuned yet: see the status")
    return found


def probes_csv(checkpoints: Sequence[ProbedCheckpoint]) -> str:
    """One line per checkpoint: its labels, its AP, and its probes and their cost in seconds."""
    names = list(dict.fromkeys(name for c in checkpoints for name in c.probes))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*_LABELS, "ap", *names, *(f"{name}_seconds" for name in names)])
    for c in checkpoints:
        values = [part.get(name, "") for part in (c.probes, c.seconds) for name in names]
        writer.writerow([*c.labels, c.ap, *values])
    return buffer.getvalue()


def rank_correlations(checkpoints: Sequence[ProbedCheckpoint]) -> str:
    """Each probe's Spearman correlation with the AP, the best first: a table per label fraction.

    A probe is compared over the checkpoints that have it; at least three are needed.
    """
    fractions = dict.fromkeys(c.labels[-1] for c in checkpoints)
    parts = []
    for fraction in fractions:
        table = _rank_table([c for c in checkpoints if c.labels[-1] == fraction])
        title = f"{100 * fraction:g} % of the labels:\n\n" if len(fractions) > 1 else ""
        parts.append(title + table)
    return "\n\n".join(parts)


def _rank_table(checkpoints: Sequence[ProbedCheckpoint]) -> str:
    rows = []
    for name in dict.fromkeys(name for c in checkpoints for name in c.probes):
        having = [c for c in checkpoints if name in c.probes]
        if len(having) < 3:
            continue
        values, aps = [c.probes[name] for c in having], [c.ap for c in having]
        constant = len(set(values)) == 1 or len(set(aps)) == 1
        rho = 0.0 if constant else float(spearmanr(values, aps).statistic)
        seconds = statistics.fmean(c.seconds[name] for c in having)
        rows.append([name, rho, len(having), seconds])
    rows.sort(key=lambda row: -row[1])
    headers = ["probe", "Spearman", "checkpoints", "seconds"]
    return tabulate(rows, headers, floatfmt=("", ".2f", "", ".1f"), tablefmt="github")


def _finetunings(sweep: SweepFile) -> dict[tuple[str, tuple[Any, ...]], list[Run]]:
    """(fine-tuning, labels of the checkpoint) -> its runs with all seeds."""
    groups: dict[tuple[str, tuple[Any, ...]], list[Run]] = {}
    for entry in sweep.plan.entries:
        if entry["kind"] == FINETUNE and "pretrain_seed" in entry:
            keys = ("init", "pretrain_seed", "checkpoint", "label_fraction")
            labels = tuple(entry[key] for key in keys)
            groups.setdefault((entry["finetune"], labels), []).append(sweep.plan.runs[entry["run"]])
    return groups


def _mean(runs: Sequence[Run], metric: str) -> float | None:
    """Mean over the seeds; None if one is missing. A detector that finds nothing has AP 0."""
    if not runs or not all(os.path.exists(run.product) for run in runs):
        return None
    return statistics.fmean(value_of(run, metric) or 0.0 for run in runs)


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Work in a folder, if it still exists."""
    before = os.getcwd()
    if os.path.isdir(folder):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _probe(run: Run, sweep: str, copies: Mapping[str, str]) -> Mapping[str, Any]:
    """The probe of the weights and data of a fine-tuning, made once."""
    folder = os.path.join(sweep, "probes", os.path.basename(run.folder))
    path = os.path.join(folder, PROBE_FILE)
    if os.path.exists(path) and os.path.getmtime(path) >= state.finished_at(run):
        return read_json(path, dict, "delete it to probe again")
    (task,) = run.tasks
    config, overrides = config_of(task)
    config = copies.get(config, config)
    return do_probe(load_config(config, [*overrides, f"train.output_dir={folder}"]))


def _add_probe(checkpoint: ProbedCheckpoint, found: Mapping[str, Any]) -> None:
    seconds = found["seconds"]
    for level, values in found["levels"].items():
        for name, value, cost in (
            ("knn", values["knn"]["top1"], seconds["features"] + seconds["knn"]),
            ("linear", values["linear"]["top1"], seconds["features"] + seconds["linear"]),
            ("retrieval", values["retrieval"], seconds["features"] + seconds["second_view"]),
            ("variance_within", values["variance_within"], seconds["features"]),
        ):
            if value is not None:
                checkpoint.probes[f"{name}_{level}"] = value
                checkpoint.seconds[f"{name}_{level}"] = cost
