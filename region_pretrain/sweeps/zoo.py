"""Publishes the pre-trainings of a sweep: their weights, and a ``metafile.yml`` with cards."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig

from region_pretrain.config import load_file
from region_pretrain.convert.export import write_export
from region_pretrain.data.sources import register_named
from region_pretrain.engine.checkpoint import FINAL as FINAL_CHECKPOINT
from region_pretrain.engine.environment import versions
from region_pretrain.errors import UserError
from region_pretrain.files import is_local, make_writable, sha256_of
from region_pretrain.shipped import ROOT
from region_pretrain.sweeps import state
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, Run, config_of
from region_pretrain.sweeps.results import collect, pretrainings
from region_pretrain.sweeps.rows import Row
from region_pretrain.sweeps.state import SweepFile
from region_pretrain.zoo import METAFILE, read_content, read_metafile, write_metafile

_TASKS = {"bbox": "Object Detection", "segm": "Instance Segmentation"}


def write_zoo(folder: str, out: str) -> list[str]:
    """Export the finished pre-trainings of a sweep, the first seed of each, with their cards.

    The weights are those of ``tools/export.py --to detectron2``: the detector's parameters under
    stock names. Their files are called ``<config>-<first 8 digits of the SHA-256>.pth``, as those
    of torchvision.

    Args:
        folder: the sweep's folder.
        out: folder of the weights and of ``metafile.yml``, which keeps its cards of other names.
            Weights have the name of their config, followed by that of the initialisation if several
            have one config.

    Returns:
        Paths of the metafile and of the weights.

    Raises:
        UserError: the folder contains no sweep, none of its pre-trainings is finished, or ``out``
            cannot be written, or has a ``metafile.yml`` that cannot be read.
    """
    sweep, metafile = state.read_sweep(folder), os.path.join(out, METAFILE)
    earlier: dict[str, Any] = {}
    if os.path.exists(metafile):
        read_metafile(metafile)  # refuses one that would get lost
        earlier = read_content(metafile)
    rows = collect(sweep)
    baselines = [row for row in rows if row.images_seen == 0]
    collections: dict[str, dict[str, Any]] = {}
    models, paths = [], []
    firsts = {init: next(iter(runs.items())) for init, runs in pretrainings(sweep).items()}
    stems = Counter(Path(_config_of(sweep, run)).stem for _, run in firsts.values())
    for init, (seed, run) in firsts.items():
        if not state.is_finished(run):
            continue
        make_writable(out, "the output folder")
        config = _config_of(sweep, run)
        collection = _collection(sweep, init, config)
        collections[collection["Name"]] = collection
        stem = Path(config).stem
        name = stem if stems[stem] == 1 else f"{stem}_{init}"
        weights, sha256 = _export(run, out, name)
        mine = [_of_seed(row, seed) for row in rows if row.init == init and row.checkpoint == FINAL]
        models.append(
            {
                "Name": name,
                "In Collection": collection["Name"],
                "Config": config,
                "Metadata": {
                    **_facts(sweep, run, mine, seed),
                    "Seed": seed,
                    "Detector": _detector(sweep, init),
                    "File Size": os.path.getsize(weights),
                    "SHA256": sha256,
                    "Library Versions": {k: str(v) for k, v in versions().items()},
                },
                "Results": [r for row in mine for r in _results(sweep, row, baselines)],
                "Weights": os.path.basename(weights),
            }
        )
        paths.append(weights)
    if not models:
        raise UserError(f"{folder}: no pre-training is finished yet; see its status")
    write_metafile(
        metafile,
        {
            key: list({e.get("Name"): e for e in [*(earlier.get(key) or []), *mine]}.values())
            for key, mine in (("Collections", collections.values()), ("Models", models))
        },
    )
    return [metafile, *paths]


def _config_of(sweep: SweepFile, run: Run) -> str:
    """A run's config, relative to the checkout if it is in there."""
    path = Path(config_of(run.tasks[0])[0])
    for root in (sweep.root, ROOT):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return str(path)


def _export(run: Run, out: str, name: str) -> tuple[str, str]:
    part = os.path.join(out, f"{name}.pth")
    write_export(os.path.join(run.folder, f"{FINAL_CHECKPOINT}.pth"), "detectron2", part)
    sha256 = sha256_of(part)
    path = os.path.join(out, f"{name}-{sha256[:8]}.pth")
    os.replace(part, path)
    return path, sha256


def _collection(sweep: SweepFile, init: str, config: str) -> dict[str, Any]:
    """The method: for those in projects/, the README's heading and the paper it names first."""
    found: dict[str, Any] = {"Name": sweep.methods.get(init, sweep.labels[init])}
    readme = Path(config).parent.parent / "README.md"
    path = Path(sweep.root, readme)
    if readme.parts[0] != "projects" or not path.is_file():
        return found
    text = path.read_text(encoding="utf-8")
    if paper := re.search(r"arXiv[: ](\d{4}\.\d{4,5})", text):
        heading = text.partition("\n")[0].lstrip("# ")
        found["Paper"] = {"Title": heading, "URL": f"https://arxiv.org/abs/{paper[1]}"}
    return found | {"README": readme.as_posix()}


def _run_config(run: Run) -> DictConfig:
    cfg = load_file(os.path.join(run.folder, "config.yaml"))
    register_named(cfg)
    return cfg


def _names(value: Any) -> str:
    names = instantiate(value)
    return names if isinstance(names, str) else ", ".join(names)


def _of_seed(row: Row, seed: int) -> Row:
    """A row's fine-tunings from the pre-training of one seed."""
    mine = {seeds: values for seeds, values in row.by_seeds.items() if seeds[0] == seed}
    return replace(row, by_seeds=mine)


def _initial_weights(sweep: SweepFile, run: Run, cfg: DictConfig) -> str | None:
    """What a pre-training starts from: another one of the sweep, or a file by its name."""
    for parent in (sweep.plan.runs[i] for i in run.parents):
        if parent.kind == PRETRAIN:
            return parent.name
    path = cfg.train.init_checkpoint
    return (os.path.basename(os.path.normpath(path)) if path and is_local(path) else path) or None


def _facts(sweep: SweepFile, run: Run, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    cfg, progress = _run_config(run), state.progress(run)
    dataset = cfg.dataloader.train.dataset
    facts = {
        "Training Data": _names(dataset.names),
        "Initial Weights": _initial_weights(sweep, run, cfg),
        "Regions": dataset.get("recipe") if dataset.get("regions") else None,
        "Iterations": progress.total if progress else None,
        "Batch Size": cfg.dataloader.train.total_batch_size,
        "Images Seen": next((row.images_seen for row in rows), None),
        "Minutes": next((row.costs[seed].minutes for row in rows if seed in row.costs), None),
    }
    if facts["Minutes"] is not None:
        facts["Minutes"] = round(facts["Minutes"], 2)
    return {key: value for key, value in facts.items() if value is not None}


def _finetunings(sweep: SweepFile, init: str, **keys: Any) -> Iterator[Run]:
    """The fine-tunings from an initialisation whose entries have the given values."""
    for entry in sweep.plan.entries:
        if entry["kind"] == FINETUNE and entry["init"] == init:
            if all(entry[key] == value for key, value in keys.items()):
                yield sweep.plan.runs[entry["run"]]


def _detector(sweep: SweepFile, init: str) -> str | None:
    return next((_config_of(sweep, run) for run in _finetunings(sweep, init)), None)


def _results(sweep: SweepFile, row: Row, baselines: Sequence[Row]) -> list[Mapping[str, Any]]:
    """One entry per task: means over the fine-tunings, and those of the sweep's baselines."""
    how = {key: getattr(row, key) for key in ("finetune", "label_fraction", "checkpoint")}
    run = next(filter(state.is_finished, _finetunings(sweep, row.init, **how)), None)
    if run is None:
        return []
    cfg = _run_config(run)
    others = [b for b in baselines if (b.finetune, b.labels) == (row.finetune, row.labels)]
    found = []
    for task, title in _TASKS.items():
        name = "box" if task == "bbox" else "mask"
        means = {m: row.statistics(f"{task}/{m}")["mean"] for m in ("AP", "AP50", "AP75")}
        metrics = {f"{name} {m}": round(v, 2) for m, v in means.items() if v is not None}
        if not metrics:
            continue
        values = {b.label: b.statistics(f"{task}/AP")["mean"] for b in others}
        how = {
            "Config": _config_of(sweep, run),
            "Training Data": _names(cfg.dataloader.train.dataset.names),
            "Labelled Images": row.labels,
            "Iterations": cfg.train.max_iter,
            "Learning Rate": row.learning_rate,
            "Seeds": len(row.by_seeds),
            "Baselines": {
                k: {f"{name} AP": round(v, 2)} for k, v in values.items() if v is not None
            },
        }
        found.append(
            {
                "Task": title,
                "Dataset": _names(cfg.dataloader.test.dataset.names),
                "Metrics": metrics,
                "Fine-tuning": how,
            }
        )
    return found
