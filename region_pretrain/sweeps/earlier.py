"""Runs of a sweep's folder whose results are of other settings or of files replaced since."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from region_pretrain.config import changed_keys, read_saved
from region_pretrain.convert.reading import checkpoint_of
from region_pretrain.dataset_names import is_path_name
from region_pretrain.engine.output_dir import holds_run
from region_pretrain.errors import UserError, first_few
from region_pretrain.sweeps.configs import load
from region_pretrain.sweeps.graph import CHOICE, CONFIG, REGIONS, Plan, Run, config_of
from region_pretrain.sweeps.state import finished_at, is_finished

#: Keys that do not make a run another one, or whose values are paths that the sweep chooses.
_NOT_SETTINGS = (
    "train.output_dir",
    "train.register",
    "train.writers",
    "train.tracking",
    "train.pictures",
    "train.init_checkpoint",
    "dataloader.train.dataset.regions",
)
#: Overrides among the arguments of the tool that makes regions.
_OF_REGIONS = ("dataloader.", "train.register=")
_SHOWN = 5


def describe_earlier(plan: Plan) -> list[str]:
    """Which runs will be computed although one of the same name has been, and what has changed.

    Then, which finished runs are older than a file that they read: they are not computed again.

    Args:
        plan: the runs of the sweep.

    Returns:
        Lines of text; none if there are no such runs.
    """
    return _computed_again(plan) + _outdated(plan)


def _computed_again(plan: Plan) -> list[str]:
    found = list(_earlier_runs(plan))
    if not found:
        return []
    count, verb = (f"{len(found)} runs have", "are") if len(found) > 1 else ("1 run has", "is")
    kept = f"kept in {os.path.dirname(found[0][1])}"
    lines = [f"{count} been computed with other settings, {kept}, and {verb} computed again:"]
    for run, folder in found[:_SHOWN]:
        changed = _changes(run, folder) or "another pre-training, checkpoint or region store"
        lines.append(f"  {os.path.basename(folder)}: {changed}")
    return lines + ([f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])


def _earlier_runs(plan: Plan) -> Iterator[tuple[Run, str]]:
    """The trainings without a folder, each with the newest other folder of its name."""
    planned = {run.folder for run in plan.runs.values()}
    folders: dict[str, list[str]] = {}
    for base in {os.path.dirname(folder) for folder in planned}:
        for name in os.listdir(base) if os.path.isdir(base) else []:
            path, parts = os.path.join(base, name), re.fullmatch(r"(.+)-[0-9a-f]{12}", name)
            if parts and path not in planned and holds_run(path):
                folders.setdefault(os.path.join(base, parts[1]), []).append(path)
    for run in plan.runs.values():
        mine = folders.get(os.path.join(os.path.dirname(run.folder), run.name))
        if mine and run.kind not in (REGIONS, CHOICE) and not os.path.isdir(run.folder):
            yield run, max(mine, key=os.path.getmtime)


def _outdated(plan: Plan) -> list[str]:
    """A line per file that has been written after a result that is made of it.

    The line lists all finished runs that have to be deleted for another result: those that read the
    file, and those that follow from them, such as the choice of a learning rate.
    """
    newer: dict[str, set[str]] = {}  # run id -> the files that it is older than
    for run in plan.runs.values():  # parents first
        if not is_finished(run):
            continue
        ended = finished_at(run)
        own = os.path.dirname(run.folder) + os.sep  # files of runs are as old as these runs
        files = {p for p in _files(run) if not p.startswith(own) and os.path.getmtime(p) > ended}
        parents = [plan.runs[parent] for parent in run.parents]
        files |= {p.product for p in parents if is_finished(p) and finished_at(p) > ended}
        newer[run.id] = files.union(*(newer.get(parent.id, ()) for parent in parents))
    lines = []
    for path in sorted(set().union(*newer.values())):
        folders = [plan.runs[run].folder for run, files in newer.items() if path in files]
        names = " ".join(map(os.path.basename, folders))
        lines.append(
            f"{path} is newer than the results of {len(folders)} finished runs, which are not "
            f"computed again; for that, delete in {os.path.dirname(folders[0])}: {names}"
        )
    return lines


def _files(run: Run) -> set[str]:
    """Local files that a run's config names as data or weights."""
    if CONFIG not in run.tasks[0]:
        return set()
    config, overrides = _config(run)
    cfg = OmegaConf.to_container(load(config, overrides))
    weights, _, _ = (cfg["train"].get("init_checkpoint") or "").partition("?")
    weights = checkpoint_of(os.path.expanduser(weights))
    todo = [cfg["dataloader"], cfg["model"], weights]
    if run.kind == REGIONS:
        todo = [cfg["dataloader"]["train"]["dataset"]["names"]]
    found = set()
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str):
            path = value.removeprefix("coco://").partition("?")[0]  # ?images=DIR or ?part=NAME
            path = os.path.expanduser(unquote(path) if path != value else path)
            if value in MetadataCatalog and not is_path_name(value):
                path = MetadataCatalog.get(value).get("json_file") or ""
            if os.path.isfile(path):
                found.add(path)
    return found


def _config(run: Run) -> tuple[str, list[str]]:
    """The config of a run and its overrides, without the file of a choice."""
    config, overrides = config_of(run.tasks[0])
    if run.kind == REGIONS:  # the tool has other arguments as well
        overrides = [word for word in overrides if word.lstrip("+").startswith(_OF_REGIONS)]
    return config, overrides


def _changes(run: Run, folder: str) -> str:
    """``key: old -> new`` of the settings that differ from a run's saved config."""
    config, overrides = _config(run)
    # The file of a choice, which the saved config has the learning rate of, may not exist yet.
    chosen = ("optimizer.lr",) if any(word.startswith("@") for word in run.tasks[0]) else ()
    try:
        saved = read_saved(os.path.join(folder, "config.yaml"))
    except UserError:
        return "its config.yaml cannot be read"
    changed = [
        f"{key}: {old} -> {new}"
        for key, (old, new) in changed_keys(saved, load(config, overrides)).items()
        if not any(key == k or key.startswith(f"{k}.") for k in (*_NOT_SETTINGS, *chosen))
    ]
    return first_few(changed, _SHOWN, "; ")
