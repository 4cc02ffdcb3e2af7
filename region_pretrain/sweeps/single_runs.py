"""Fine-tunings that were started one by one, compared as those of a sweep are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from region_pretrain.config import read_saved
from region_pretrain.engine.checkpoint import FINAL as MODEL
from region_pretrain.engine.environment import read_machine
from region_pretrain.engine.output_dir import differing_settings
from region_pretrain.errors import UserError, first_few
from region_pretrain.metrics import DIVERGED, read_results
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.graph import FINETUNE, Run
from region_pretrain.sweeps.intervals import Seeds, pair
from region_pretrain.sweeps.report import tables_text
from region_pretrain.sweeps.results import tested_on, value_of
from region_pretrain.sweeps.rows import METRICS, Row
from region_pretrain.sweeps.tables import tables

#: Settings that a comparison may vary: the weights, the learning rate of each, and the seeds.
_SEEDS = ("train.seed", "dataloader.train.dataset.seed")  # of the training, and of a few labels
_RATES = ("optimizer.lr", "optimizer.params.base_lr")
_FRACTION = "dataloader.train.dataset.fraction"
_COMPARED = ("train.init_checkpoint", *_RATES, *_SEEDS)
_RESULTS = ("results.json", "results_eval.json")
_SHOWN = 10
_ONE_PRETRAINING = (
    "Each row is of one checkpoint: another pre-training may differ by more than these intervals."
)


@dataclass
class _Group:
    """Repetitions of a training: their row, and seeds as in its ``by_seeds`` -> run, config."""

    row: Row
    members: dict[Seeds, tuple[Run, dict[str, Any]]] = field(default_factory=dict)


def compare_runs(folders: Sequence[str]) -> str:
    """Tables of fine-tunings, with the differences from the first one's weights, as text.

    Runs of the same weights and learning rate are repetitions if nothing but the seed differs.
    Runs with equal seeds are pairs; settings that should be equal in a pair and are not are listed.

    Args:
        folders: output folders of finished fine-tunings, or of evaluations.

    Raises:
        UserError: a folder contains no results of a detector, or two are of the same training.
    """
    groups: list[_Group] = []
    for run in [_finished(folder) for folder in folders]:
        cfg = read_saved(os.path.join(run.folder, "config.yaml"))
        same = (g for g in groups if not _differing(next(iter(g.members.values()))[1], cfg, _SEEDS))
        group = next(same, None)
        if group is None:
            group = _Group(_new_row(run, cfg, {g.row.label for g in groups}))
            groups.append(group)
        machine = read_machine(run.folder)
        seeds = (None, cfg["train"]["seed"], *([] if machine is None else [machine]))
        if seeds in group.members:
            raise UserError(
                f"{group.members[seeds][0].name} and {run.name} have equal settings and the seed "
                f"{seeds[1]}: name one of them, or repeat the training with another train.seed"
            )
        group.members[seeds] = run, cfg
        group.row.by_seeds[seeds] = {key: value_of(run, key) for key in METRICS}
        group.row.wanted = len(group.members)
    rows = [group.row for group in groups]
    parts = tables_text(tables(rows, {}, [rows[0].init], brief=True))
    key = next(iter(METRICS))
    pairs = [pair(row.values(key), rows[0].values(key)) for row in rows[1:]]
    parts += [_ONE_PRETRAINING] if any(len(found) > 1 for found in pairs) else []
    return "\n\n".join([*parts, *_unpaired(rows), *_unequal(groups)])


def _finished(folder: str) -> Run:
    """A fine-tuning as a node of a sweep's graph.

    Raises:
        UserError: the folder contains no results of a detector.
    """
    name = folder.rstrip("/") or folder
    if os.path.basename(name) in _RESULTS:
        name = os.path.dirname(name) or "."
    if not os.path.isdir(name):
        raise UserError(f"there is no folder {name}: expected the output folder of a fine-tuning")
    if os.path.isfile(os.path.join(name, "sweep.json")):
        raise UserError(f"{name} is a sweep: region-pretrain sweep report {name} compares its runs")
    if not os.path.isfile(os.path.join(name, "config.yaml")):
        raise UserError(f"{name} has no config.yaml: expected the output folder of a fine-tuning")
    paths = [path for n in _RESULTS if os.path.isfile(path := os.path.join(name, n))]
    if not paths:
        raise UserError(
            f"{name} has no {_RESULTS[0]}: it is a pre-training, or a fine-tuning that has not "
            "finished; continue that with --resume"
        )
    tasks = {key.partition("/")[0] for key in METRICS}
    results = read_results(paths[0])
    if results and not results.keys() & {*tasks, DIVERGED}:
        raise UserError(f"{paths[0]} has neither box nor mask AP, only {', '.join(results)}")
    return Run(name, FINETUNE, name, "", (), os.path.abspath(name), paths[0])


def _new_row(run: Run, cfg: dict[str, Any], labels: set[str]) -> Row:
    weights = cfg["train"].get("init_checkpoint") or ""
    label = weights.removesuffix(f"/{MODEL}.pth") or "random weights"
    if os.path.isabs(label) and not os.path.relpath(label).startswith(os.pardir):
        label = os.path.relpath(label)
    label = f"{label} ({run.name})" if label in labels else label
    saved = OmegaConf.create(cfg)
    fraction, rate = (OmegaConf.select(saved, key) for key in (_FRACTION, _RATES[0]))
    return Row(
        run.name,
        label,
        label,
        "",
        float(fraction or 1),
        FINAL,
        learning_rate=f"{rate:g}" if isinstance(rate, int | float) else None,
        test_data=tested_on(run),
    )


def _differing(one: dict[str, Any], other: dict[str, Any], allowed: Sequence[str]) -> list[str]:
    changed = differing_settings(one, other)
    return [f"{key}: {a} -> {b}" for key, (a, b) in changed.items() if key not in allowed]


def _unpaired(rows: Sequence[Row]) -> list[str]:
    """A line if weights have no run with a seed of the first ones'."""
    first, *others = rows
    key = next(iter(METRICS))
    alone = [row.label for row in others if not pair(row.values(key), first.values(key))]
    text = f"No run has the train.seed of one of {first.label}, so there is no difference: "
    return [text + ", ".join(alone)] if alone else []


def _unequal(groups: Sequence[_Group]) -> list[str]:
    """The settings of each run that differ from those of its partner, apart from the compared."""
    first, *others = groups
    partners = {seeds[1]: cfg for seeds, (_, cfg) in first.members.items()}
    default = next(iter(partners.values()))
    lines = []
    for group in others:
        for (_, seed, *_), (run, cfg) in group.members.items():
            found = _differing(partners.get(seed, default), cfg, _COMPARED)
            lines += [f"  {run.name}: {first_few(found, _SHOWN, '; ')}"] if found else []
    if not others:
        return []
    equal = "Apart from weights, learning rate and seed, all settings are those of"
    unequal = (
        "Not comparable without care: apart from weights, learning rate and seed, these differ from"
    )
    return ["\n".join([f"{unequal if lines else equal} {first.row.label}.", *lines])]
