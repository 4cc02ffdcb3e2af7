"""The files of a sweep, and the progress of its runs."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from glob import escape, glob

from region_pretrain.errors import UserError
from region_pretrain.files import NFS_SECONDS, now_at
from region_pretrain.jobs.attempts import ATTEMPTS_FILE, Attempt, read_attempts
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.json_files import read_json, write_json
from region_pretrain.lease import PREFIX
from region_pretrain.progress import Progress, read_progress
from region_pretrain.sweeps.graph import REGIONS, Plan, Run

_VERSION = 2
_SWEEP, _RUN = "sweep.json", "run.json"
WAITING, QUEUED, RUNNING, FINISHED = "waiting", "queued", "running", "finished"
FAILED, BLOCKED, CANCELLED, UNKNOWN = "failed", "blocked", "cancelled", "unknown"
#: States that a run leaves only when the sweep is started again.
ENDED = (FINISHED, FAILED, BLOCKED, CANCELLED)

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_SUBMITIT = "submitit ERROR"  # its traceback follows, which repeats the tool's output
_TAIL_BYTES = 20_000
_CAUSE_LINES = 15


@dataclass
class Record:
    """The submissions of a run: ``run.json`` in its folder.

    Attributes:
        submitted: number of submissions.
        job_ids: jobs of the latest submission, one per task.
        logs: log files of these jobs.
        cancelled: whether the latest submission was cancelled.
        gpus: ``CUDA_VISIBLE_DEVICES`` of a job on this machine; "" if its coordinator chose none.
        code: name of the copy of the code that these jobs run, in the sweep's ``code/``; "" if an
            earlier version has written this.
    """

    submitted: int = 0
    job_ids: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    cancelled: bool = False
    gpus: str = ""
    code: str = ""


@dataclass
class SweepFile:
    """``sweep.json`` in a sweep's folder.

    Attributes:
        name: the sweep's name.
        title: heading of its report.
        command: command line of its latest start.
        cluster: where its jobs run.
        root: the code that they run.
        cwd: the folder that relative paths refer to.
        labels: initialisation -> its name in tables.
        images_seen: length of every pre-training in images; null: they differ, or their configs
            determine it.
        plan: the runs.
        pictures: number of images per picture of the report; 0: no pictures.
        methods: pre-training -> the name of its curve in figures against the images seen.
        notes: text beside the results.
        user: who started it last.
        configs: path of a config of the user's own -> its copy, which jobs read.
        version: of this format.
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
    methods: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    user: str = ""
    configs: dict[str, str] = field(default_factory=dict)
    version: int = _VERSION


def write_sweep(folder: str, sweep: SweepFile) -> None:
    """Write ``sweep.json``."""
    write_json(os.path.join(folder, _SWEEP), asdict(sweep))


def read_sweep(folder: str) -> SweepFile:
    """Read ``sweep.json``. Its runs and copies are those below ``folder``, wherever that was.

    Raises:
        UserError: the folder contains no sweep, one of another version, or a damaged one.
    """
    path = os.path.join(folder, _SWEEP)
    fix = "delete it and start the sweep again, which keeps its finished runs"
    try:
        sweep = read_json(path, SweepFile, fix)
    except FileNotFoundError:
        raise UserError(f"{folder} contains no sweep: there is no {path}") from None
    if sweep.version != _VERSION:
        raise UserError(f"{path} was written by another version: set another sweep.output_dir")
    runs = sweep.plan.runs
    before = {os.path.dirname(os.path.dirname(run.folder)) for run in runs.values()}
    now = os.path.abspath(folder)
    if len(before) == 1 and (old := before.pop()) != now:

        pattern = re.compile(rf"(?<![\w.~-]){re.escape(old + os.sep)}")  # not within a longer path

        def here(text: str) -> str:
            return pattern.sub(lambda _: now + os.sep, text)

        for name, run in runs.items():
            tasks = tuple(tuple(map(here, task)) for task in run.tasks)
            runs[name] = replace(
                run, folder=here(run.folder), product=here(run.product), tasks=tasks
            )
        sweep.root = here(sweep.root)
        sweep.configs = {path: here(copy) for path, copy in sweep.configs.items()}
    return sweep


def claim(folder: str, name: str) -> None:
    """Create a sweep's folder.

    Raises:
        UserError: it belongs to another sweep, contains something else, or cannot be created.
    """
    fix = "set another sweep.output_dir"
    if os.path.isfile(os.path.join(folder, _SWEEP)):
        other = read_sweep(folder).name
        if other != name:
            raise UserError(f"{folder} belongs to the sweep {other}, not to {name}: {fix}")
    elif os.path.exists(folder) and not _is_free(folder):
        raise UserError(f"{folder} is not empty and contains no sweep: {fix}")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error}; {fix}") from error


def _is_free(folder: str) -> bool:
    """Whether a folder is empty, or that of a sweep whose file is deleted or not written yet."""
    if not os.path.isdir(folder):
        return False
    names = [name for name in os.listdir(folder) if not name.startswith(PREFIX)]
    return not names or "runs" in names or names == ["code"]


def read_record(run: Run) -> Record | None:
    """A run's record; None if it was never submitted.

    Raises:
        UserError: the record is damaged.
    """
    path = os.path.join(run.folder, _RUN)
    fix = f"delete it, and {run.name} counts as never submitted"
    try:
        return read_json(path, Record, fix)
    except FileNotFoundError:
        return None


def all_records(folder: str) -> dict[str, Record]:
    """The records of a sweep's folder, also those of runs that have left its plan, by run folder.

    Raises:
        UserError: a record is damaged.
    """
    found = {}
    for path in sorted(glob(os.path.join(escape(folder), "runs", "*", _RUN))):
        fix = "delete it, and its run counts as never submitted"
        found[os.path.dirname(path)] = read_json(path, Record, fix)
    return found


def write_record(run: Run, record: Record) -> None:
    """Write a run's record."""
    os.makedirs(run.folder, exist_ok=True)
    write_json(os.path.join(run.folder, _RUN), asdict(record))


def is_finished(run: Run) -> bool:
    """Whether the run's product exists."""
    return os.path.exists(run.product)


def blocked_by(plan: Plan, failed: set[str]) -> dict[str, str]:
    """The runs that cannot start because a run that they depend on has failed.

    Args:
        plan: the runs.
        failed: ids of the failed ones.

    Returns:
        Run id -> id of the failed run that it depends on, directly or indirectly.
    """
    blocked: dict[str, str] = {}
    for run in plan.runs.values():
        for parent in run.parents:
            cause = parent if parent in failed else blocked.get(parent)
            if cause is not None and run.id not in failed and not is_finished(run):
                blocked.setdefault(run.id, cause)
    return blocked


def counted(states: Mapping[str, str]) -> str:
    """The number of runs in each state, such as ``2 finished, 1 running``."""
    counts = Counter(states.values())
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def tail(path: str, count: int) -> list[str]:
    """The last non-empty lines of a text file; none if it does not exist."""
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = (_ANSI.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text))
    return list(deque((line for line in lines if line), maxlen=count))


def failure(run: Run) -> list[str]:
    """The cause of a failure: the tool's error message on bad input, otherwise its log's tail.

    That of the newest attempt of the latest submission that failed, which may be any process of any
    shard; otherwise the first log.
    """
    record = read_record(run) or Record()
    failed = [a for a in attempts(run) if a.get("error") and a["job"] in record.job_ids]
    if failed:
        newest = max(failed, key=lambda attempt: attempt.get("ended") or attempt["started"])
        return _cause(newest["error"].splitlines())
    for path in record.logs:
        lines = tail(path, 200)
        ends = [i for i, line in enumerate(lines) if line.startswith(_SUBMITIT)]
        lines = lines[: ends[0]] if ends else lines
        if lines:
            return _cause(lines)
    return []


def _cause(lines: list[str]) -> list[str]:
    last = lines[-1].strip() if lines else ""
    return [last] if last.startswith("error: ") else lines[-_CAUSE_LINES:]


def progress(run: Run) -> Progress | None:
    """The progress of a training in iterations, or of region generation in images.

    Returns:
        None if the run has written none yet. For a region store, the sum over its shards, and None
        once it is finished.
    """
    if run.kind != REGIONS:
        return read_progress(os.path.join(run.folder, "progress.json"))
    paths = glob(os.path.join(escape(f"{run.product}.parts"), "progress-*.json"))
    shards = [shard for path in paths if (shard := read_progress(path)) is not None]
    if not shards:
        return None
    return Progress(
        sum(shard.done for shard in shards),
        sum(shard.total for shard in shards),
        max((s.seconds_left for s in shards if s.seconds_left is not None), default=None),
        max(shard.updated for shard in shards),
    )


def attempts(run: Run) -> list[Attempt]:
    """All attempts of a run (see :class:`Attempt`), including those of its shards.

    A finished run's attempt that has not recorded its end yet gets the time of the product.
    """
    found = [attempt for folder in _attempt_folders(run) for attempt in read_attempts(folder)]
    if is_finished(run):
        for attempt in found:
            if "outcome" not in attempt:
                attempt["ended"] = max(attempt["started"], os.path.getmtime(run.product))
    return found


def _attempt_folders(run: Run) -> list[str]:
    return [run.folder, *sorted(glob(os.path.join(escape(run.folder), "shard*")))]


def _look_again(run: Run) -> None:
    """Let an NFS client see what other machines have written to the run's folders."""
    for folder in (run.folder, os.path.dirname(run.product), *_attempt_folders(run)[1:]):
        with contextlib.suppress(OSError):
            os.listdir(folder)


def ended_state(run: Run, record: Record) -> str:
    """The state of a run of which all jobs have left SLURM's queue.

    An NFS client may not see the product of a run that has just finished yet. Such a run counts as
    running for at most :data:`~region_pretrain.files.NFS_SECONDS`.

    Returns:
        ``finished``, ``running`` or ``failed``.
    """
    _look_again(run)
    if is_finished(run):
        return FINISHED
    newest = {attempt["job"]: attempt.get("outcome") for attempt in attempts(run)}
    if any(newest.get(job) != FINISHED for job in record.job_ids):
        return FAILED
    files = (os.path.join(folder, ATTEMPTS_FILE) for folder in _attempt_folders(run))
    ended = max(os.path.getmtime(path) for path in files if os.path.exists(path))
    return RUNNING if now_at(run.folder) - ended < NFS_SECONDS else FAILED


def failed_jobs(run: Run, record: Record | None, live: Collection[str] | None = None) -> list[str]:
    """The jobs of a run's submission, if there are several, that ended before they had finished.

    Args:
        run: the run.
        record: its submission.
        live: the jobs that are queued or running; None: unknown. Then only those count that have
            recorded a failure, and not e.g. those that were cancelled.
    """
    if record is None or len(record.job_ids) < 2:
        return []
    ended = () if live is None else set(record.job_ids).difference(live)
    if ended:
        _look_again(run)
    newest = {attempt["job"]: attempt.get("outcome") for attempt in attempts(run)}
    return sorted(
        job
        for job in record.job_ids
        if newest.get(job) == FAILED or job in ended and newest.get(job) != FINISHED
    )


def finished_at(run: Run) -> float:
    """Unix time at which a finished run wrote its product, also in a copy of the sweep's folder.

    The earlier of two times, as a copy makes the file's later, and a process records its end
    seconds after it has written the file.
    """
    done = [a for a in attempts(run) if a.get("outcome", "finished") == "finished"]
    ended = max((attempt.get("ended") or 0.0 for attempt in done), default=0.0)
    return min(ended or math.inf, os.path.getmtime(run.product))


def minutes(run: Run) -> float:
    """Total minutes of a run's ended attempts."""
    return sum((a.get("ended") or a["started"]) - a["started"] for a in attempts(run)) / 60
