"""The results of a sweep so far, read from the folders of its runs."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf

from region_pretrain.config import load_file
from region_pretrain.data.few_label import SUBSET_FILE
from region_pretrain.data.sources import register_named
from region_pretrain.engine.environment import read_machine
from region_pretrain.json_files import read_json
from region_pretrain.metrics import logged_rows, read_results
from region_pretrain.reporting.plots import Curve, metric_curve
from region_pretrain.reporting.summary import mean_std
from region_pretrain.sweeps import state
from region_pretrain.sweeps.choice import mean_of_trials, read_choice
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, TRIAL, Run
from region_pretrain.sweeps.rows import METRICS, Cost, Row, Statistics
from region_pretrain.sweeps.state import SweepFile

logger = logging.getLogger(__name__)

#: What identifies a row, in addition to the initialisation.
_ROW = ("finetune", "label_fraction", "checkpoint")
_PROBE = "probe/"


def collect(sweep: SweepFile) -> list[Row]:
    """The rows of the results: by fine-tuning, label fraction, initialisation and checkpoint."""
    runs = sweep.plan.runs
    groups: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in sweep.plan.entries:
        if entry["kind"] in (FINETUNE, TRIAL, CHOICE):
            groups[tuple(entry[key] for key in ("init", *_ROW))].append(entry)
    pretrained = pretrainings(sweep)
    rows, known = [], {}
    for (init, *how), entries in groups.items():
        label = sweep.labels[init]
        row = Row(init, label, sweep.methods.get(init, label), *how)
        _fill(row, entries, runs, known)
        by_seed = pretrained.get(init, {})
        row.images_seen = _images_seen(sweep, list(by_seed.values()), row.checkpoint)
        done = {seed: run for seed, run in by_seed.items() if state.is_finished(run)}
        row.costs = {seed: cost for seed, run in done.items() if (cost := _cost(run))}
        rows.append(row)
    # Also of initialisations of which no fine-tuning is finished.
    labels = {(row.finetune, row.label_fraction): row.labels for row in rows if row.labels}
    for row in rows:
        row.labels = row.labels or labels.get((row.finetune, row.label_fraction))
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
            rows = logged_rows(run.folder)
            for key in dict.fromkeys(k for row in rows for k in row if k.startswith(_PROBE)):
                values[key].append(metric_curve(rows, key)[1])
        found[init] = {
            key: tuple(mean_std([100 * curve[at] for curve in curves]) for at in (0, -1))
            for key, curves in values.items()
        }
    return {init: probes for init, probes in found.items() if probes}


def _last(checkpoint: str | int) -> float:
    return checkpoint if isinstance(checkpoint, int) else float("inf")


def value_of(run: Run, key: str) -> float | None:
    """A metric of a finished fine-tuning, e.g. ``bbox/AP``; None if the detector found nothing."""
    task, metric = key.split("/")
    # Tasks in which the detector found nothing have no entry.
    return read_results(run.product).get(task, {}).get(metric)


def _fill(
    row: Row,
    entries: Sequence[Mapping[str, Any]],
    runs: Mapping[str, Run],
    known: dict[str, int | None],
) -> None:
    finetunings = {
        (e.get("pretrain_seed"), e["seed"]): runs[e["run"]]
        for e in entries
        if e["kind"] == FINETUNE
    }
    trials = defaultdict(list)
    for entry in entries:
        run = runs[entry["run"]]
        if entry["kind"] == CHOICE and state.is_finished(run):
            row.learning_rate = read_choice(run.product)
        elif entry["kind"] == TRIAL and state.is_finished(run):
            trials[f"{entry['learning_rate']:g}"].append(value_of(run, entry["metric"]))
    row.trials = {rate: mean_of_trials(values) for rate, values in trials.items()}
    if not any(entry["kind"] == CHOICE for entry in entries):
        row.learning_rate = _configured_learning_rate(list(finetunings.values()))
    finished = {seeds: run for seeds, run in finetunings.items() if state.is_finished(run)}
    for seeds, run in finished.items():
        machine = read_machine(run.folder)
        at = seeds if machine is None else (*seeds, machine)
        row.by_seeds[at] = {key: value_of(run, key) for key in METRICS}
    row.wanted = len(finetunings)
    row.test_data = next((name for run in finished.values() if (name := tested_on(run))), None)
    row.labels = next((n for run in finished.values() if (n := _labelled_images(run, known))), None)
    metrics = [logged_rows(run.folder) for run in (finished or finetunings).values()]
    for key in METRICS:
        curves = [metric_curve(rows, key) for rows in metrics]
        row.curves[key] = mean_curve([curve for curve in curves if curve[0]])


def _saved_config(run: Run) -> DictConfig | None:
    """The config that a run has saved; None if it has not started."""
    path = os.path.join(run.folder, "config.yaml")
    return load_file(path) if os.path.isfile(path) else None


def tested_on(run: Run) -> str | None:
    """What names the test data of a fine-tuning in its config; None if it has no such key."""
    cfg = _saved_config(run)
    names = cfg and OmegaConf.select(cfg, "dataloader.test.dataset.names")
    if not OmegaConf.is_config(names):
        return names
    value = OmegaConf.to_container(names, resolve=True)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    arguments = ", ".join(f"{key}={value[key]}" for key in value if key != "_target_")
    return f"{str(value.get('_target_')).rpartition('.')[2]}({arguments})"


def _labelled_images(run: Run, known: dict[str, int | None]) -> int | None:
    """The number of images that a fine-tuning was trained on; None if it cannot be determined.

    Args:
        run: finished.
        known: data set of a config -> its length; extended.
    """
    path = os.path.join(run.folder, SUBSET_FILE)
    if os.path.isfile(path):
        fix = "delete it, and the report counts the images of the config"
        return len(read_json(path, dict[str, Any], fix).get("image_ids", ()))
    if (cfg := _saved_config(run)) is None:
        return None
    data = cfg.dataloader.train.get("dataset")
    text = json.dumps(OmegaConf.to_container(data, resolve=True), default=str) if data else ""
    if text not in known:
        try:
            register_named(cfg)
            known[text] = len(instantiate(data)) if data else None
        except Exception:  # raised by any data set
            logger.info("the training images of %s cannot be counted", run.name, exc_info=True)
            known[text] = None
    return known[text]


def _images_seen(sweep: SweepFile, runs: Sequence[Run], checkpoint: str | int) -> int | None:
    """Images seen up to a checkpoint of a pre-training, including the one that it continues.

    Args:
        runs: the pre-training, one per seed; none: the initialisation is not pre-trained.
    """
    if not runs:
        return 0
    run = next((run for run in runs if state.is_finished(run)), runs[0])
    at, cfg = state.progress(run), _saved_config(run)
    if at is None or cfg is None:
        return None
    steps = at.total if checkpoint == FINAL else int(checkpoint)
    seen = steps * cfg.dataloader.train.total_batch_size
    parents = [sweep.plan.runs[parent] for parent in run.parents]
    earlier = [parent for parent in parents if parent.kind == PRETRAIN]
    before = _images_seen(sweep, earlier, FINAL)
    return None if before is None else before + seen


def _configured_learning_rate(runs: Sequence[Run]) -> str | None:
    """``optimizer.lr`` of the first run that has written its config."""
    cfg = next(filter(None, map(_saved_config, runs)), None)
    return cfg and f"{cfg.optimizer.lr:g}"


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


def _cost(run: Run) -> Cost | None:
    """None if nothing is logged yet."""
    rows = logged_rows(run.folder)
    if not rows:
        return None
    speeds = [row["img_per_sec"] for row in rows if "img_per_sec" in row]
    memory = [row["peak_memory_mib"] for row in rows if "peak_memory_mib" in row]
    return Cost(
        statistics.median(speeds) if speeds else None,
        max(memory) if memory else None,
        step_minutes(rows),
    )
