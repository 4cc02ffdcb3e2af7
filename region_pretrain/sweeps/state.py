"""What a sweep keeps on the disk, and how far each of its runs is."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps.graph import Plan, Run

_VERSION = 1
_SWEEP, _RUN = "sweep.json", "run.json"
WAITING, QUEUED, RUNNING, FINISHED = "waiting", "queued", "running", "finished"
FAILED, BLOCKED, CANCELLED = "failed", "blocked", "cancelled"
#: The states that a run can only leave when the sweep is started again.
ENDED = (FINISHED, FAILED, BLOCKED, CANCELLED)

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_SUBMITIT = "submitit ERROR"  # its own traceback, which repeats what the tool said
_ITERATION = re.compile(r"iter (\d+)/(\d+)\s+total_loss (\S+).*\beta (.+?)(?:\s{2,}|$)")
_TAIL_BYTES = 20_000


@dataclass
class Record:
    """What is known of a run that was submitted: ``run.json`` in its folder.

    Attributes:
        submitted: how often.
        job_ids: of the newest submission, one a task.
        logs: of these jobs.
        cancelled: it was taken back.
    """

    submitted: int = 0
    job_ids: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    cancelled: bool = False


@dataclass
class SweepFile:
    """``sweep.json``.

    Attributes:
        name: of the sweep.
        title: of its report.
        command: what it was last started with.
        cluster: where its jobs run.
        root: the code that they run.
        cwd: where relative paths start.
        labels: start -> what tables call it.
        images_seen: of every pre-training; null: as the configs say.
        plan: the runs.
        pictures: number of images per picture of the report; 0: no pictures.
    """

    name: str
    title: str
    command: str
    cluster: Cluster
    root: str
    cwd: str
    labels: dict[str, str]
    images_seen: int | None
    plan: Plan
    pictures: int = 0


def write_sweep(folder: str, sweep: SweepFile) -> None:
    """Write ``sweep.json``."""
    values = asdict(sweep) | {"version": _VERSION, "plan": sweep.plan.to_json()}
    write_text_atomic(os.path.join(folder, _SWEEP), json.dumps(values, indent=1) + "\n")


def read_sweep(folder: str) -> SweepFile:
    """Read ``sweep.json``.

    Raises:
        UserError: the folder holds no sweep, or one of another version.
    """
    path = os.path.join(folder, _SWEEP)
    if not os.path.isfile(path):
        raise UserError(f"{folder} holds no sweep: there is no {path}")
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    try:
        if values.pop("version", None) != _VERSION:
            raise TypeError
        values["cluster"] = Cluster(**values["cluster"])
        values["plan"] = Plan.from_json(values["plan"])
        return SweepFile(**values)
    except (TypeError, KeyError):
        raise UserError(
            f"{path} was written by another version: take another sweep.output_dir"
        ) from None


def claim(folder: str, name: str) -> None:
    """Make a sweep's folder.

    Raises:
        UserError: it is another sweep's, or holds something else.
    """
    mend = "take another sweep.output_dir"
    if os.path.isfile(os.path.join(folder, _SWEEP)):
        other = read_sweep(folder).name
        if other != name:
            raise UserError(f"{folder} is the folder of the sweep {other}, not of {name}: {mend}")
    elif os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{folder} exists and holds no sweep: {mend}")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error}; {mend}") from error


def read_record(run: Run) -> Record | None:
    """A run's record; None where it was never submitted."""
    path = os.path.join(run.folder, _RUN)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return Record(**json.load(file))


def write_record(run: Run, record: Record) -> None:
    """Write a run's record."""
    os.makedirs(run.folder, exist_ok=True)
    text = json.dumps(asdict(record), indent=1) + "\n"
    write_text_atomic(os.path.join(run.folder, _RUN), text)


def is_finished(run: Run) -> bool:
    """Whether what the run is there for is there."""
    return os.path.exists(run.product)


def blocked_by(plan: Plan, failed: set[str]) -> dict[str, str]:
    """The runs that cannot start since one that they need has failed.

    Args:
        plan: parents first.
        failed: ids.

    Returns:
        Id -> id of the failed run that it waits for, directly or not.
    """
    blocked: dict[str, str] = {}
    for run in plan.runs.values():
        for parent in run.parents:
            cause = parent if parent in failed else blocked.get(parent)
            if cause is not None and run.id not in failed and not is_finished(run):
                blocked.setdefault(run.id, cause)
    return blocked


def counted(states: Mapping[str, str]) -> str:
    """How many runs are in each state, in words."""
    counts = Counter(states.values())
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def tail(path: str, count: int = 15) -> list[str]:
    """The last lines of a text file that are not empty; none where it is not there."""
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = (_ANSI.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text))
    return list(deque((line for line in lines if line), maxlen=count))


def failure(record: Record | None, count: int = 15) -> list[str]:
    """What a failed run said last: the tool's own word on bad input, or its log's last lines."""
    for path in record.logs if record else []:
        lines = tail(path, 200)
        ends = [i for i, line in enumerate(lines) if line.startswith(_SUBMITIT)]
        lines = lines[: ends[0]] if ends else lines
        if lines and lines[-1].startswith("error: "):
            return lines[-1:]
        if lines:
            return lines[-count:]
    return []


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        iteration, max_iter: None where it has not logged yet.
        eta: as it says itself.
        last: newest AP, else newest loss, with its name.
    """

    iteration: int | None = None
    max_iter: int | None = None
    eta: str = ""
    last: str = ""


def progress(run: Run) -> Progress:
    """How far a training's own log says that it is."""
    found = None
    for line in reversed(tail(os.path.join(run.folder, "log.txt"), 200)):
        found = _ITERATION.search(line)
        if found:
            break
    if found is None:
        return Progress()
    ap = _last_ap(os.path.join(run.folder, "metrics.json"))
    last = f"box AP {ap:.1f}" if ap is not None else f"loss {found[3]}"
    return Progress(int(found[1]), int(found[2]), found[4].strip(), last)


def _last_ap(path: str) -> float | None:
    """The newest AP; NaN, of a detector that finds nothing, is none."""
    for line in reversed(Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []):
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isnan(row.get("bbox/AP", nan)):
            return row["bbox/AP"]
    return None
