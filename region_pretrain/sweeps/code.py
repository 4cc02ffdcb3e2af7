"""The code of a sweep's runs: what is copied for its jobs, and what has changed since a run."""

from __future__ import annotations

import os
from pathlib import Path

from region_pretrain.config import to_yaml
from region_pretrain.errors import first_few
from region_pretrain.jobs.snapshot import packages_of
from region_pretrain.sweeps.configs import load
from region_pretrain.sweeps.graph import CONFIG, Plan, Run, config_of
from region_pretrain.sweeps.state import is_finished, read_record
from region_pretrain.yacs import split_overrides

_SHOWN = 5


def own_packages(plan: Plan) -> set[str]:
    """The top-level packages that the configs and overrides of a sweep's runs name."""
    files, texts = set(), set()
    for task in (task for run in plan.runs.values() for task in run.tasks if CONFIG in task):
        path, words = config_of(task)
        of_yacs, others = split_overrides(words)
        files.add((path, tuple(of_yacs)))
        texts.update(others)
    texts.update(to_yaml(load(path, of_yacs)) for path, of_yacs in files)
    return packages_of("\n".join(texts))


def finished_by_code(plan: Plan) -> dict[str, list[Run]]:
    """The copies of the code -> the finished runs that were computed with them.

    Runs of which that is not known are left out.
    """
    found: dict[str, list[Run]] = {}
    for run in filter(is_finished, plan.runs.values()):
        if (record := read_record(run)) and record.code:
            found.setdefault(record.code, []).append(run)
    return found


def describe_code(plan: Plan, root: str) -> list[str]:
    """Which finished runs were computed with other code, and what has changed.

    Args:
        plan: the runs of the sweep.
        root: the code of the runs that are started now, from
            :func:`~region_pretrain.jobs.snapshot.take_snapshot`.

    Returns:
        A line for each earlier copy of the code.
    """
    lines = []
    for name, runs in finished_by_code(plan).items():
        if name == os.path.basename(root):
            continue
        before = os.path.join(os.path.dirname(root), name)
        changed = _changed(before, root) if os.path.isdir(before) else ["its copy is gone"]
        folders = [os.path.basename(run.folder) for run in runs]
        lines.append(
            f"finished with other code and not computed again: {len(runs)} runs; changed since: "
            f"{first_few(changed, _SHOWN)} (diff -r {before} {root}); to compute them again, "
            f"delete in {os.path.dirname(runs[0].folder)}: {first_few(folders, _SHOWN, ' ')}"
        )
    return lines


def _changed(before: str, after: str) -> list[str]:
    """Files that differ between two copies, or that one of them lacks."""
    old, new = _contents(before), _contents(after)
    return sorted(name for name in old | new if old.get(name) != new.get(name))


def _contents(root: str) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in Path(root).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
