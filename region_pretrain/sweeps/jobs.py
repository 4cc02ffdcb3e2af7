"""A sweep's runs as submitit jobs, and their states."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from submitit.core.utils import JobPaths

from region_pretrain.errors import UserError
from region_pretrain.jobs import slurm
from region_pretrain.jobs.attempts import read_attempts
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.jobs.executor import submit
from region_pretrain.jobs.job import ToolJob
from region_pretrain.lease import PREFIX, holder_of
from region_pretrain.shipped import ROOT
from region_pretrain.sweeps import state
from region_pretrain.sweeps.graph import CHOICE, CONFIG, FINETUNE, REGIONS, TRIAL, Plan, Run
from region_pretrain.sweeps.state import Record, SweepFile
from region_pretrain.system import command_lines, user_name

#: A cancelled job may save a checkpoint before it ends.
ENDING_SECONDS = 150.0
#: The lease of a start. A sweep with ``--cluster debug`` runs as long as it is held.
START_LEASE = f"{PREFIX}-start"


def tool_jobs(run: Run, sweep: SweepFile) -> list[ToolJob]:
    """A run's command lines as jobs: one per shard on SLURM, a single one elsewhere."""
    tasks = run.tasks
    if len(tasks) > 1 and sweep.cluster.kind != "slurm":
        at = tasks[0].index("--shard")
        tasks = ((*tasks[0][:at], *tasks[0][at + 2 :]),)
    jobs = []
    for i, task in enumerate(tasks):
        arguments = list(task)
        if CONFIG in arguments:
            at = arguments.index(CONFIG) + 1
            arguments[at] = sweep.configs.get(arguments[at], arguments[at])
            # Those of Detectron2's model zoo are in neither place.
            for root in (sweep.root, ROOT):
                if os.path.isfile(path := os.path.join(root, arguments[at])):
                    arguments[at] = path
                    break
        folder = run.folder if len(tasks) == 1 else os.path.join(run.folder, f"shard{i}")
        resume = "" if run.kind in (REGIONS, CHOICE) else "--resume"
        job = ToolJob(run.tool, arguments, folder, sweep.root, resume, sweep.cwd)
        job.parts = f"{run.product}.parts" if run.kind == REGIONS else ""
        jobs.append(job)
    return jobs


def cluster_for(run: Run, cluster: Cluster) -> Cluster:
    """A run's resources: region generation and choices are one process each, without a GPU."""
    if run.kind in (REGIONS, CHOICE):
        return cluster.for_one_process()
    return cluster.for_finetuning() if run.kind in (TRIAL, FINETUNE) else cluster


def submit_runs(
    runs: Sequence[Run],
    sweep: SweepFile,
    folder: str,
    name: str,
    after: Sequence[str] = (),
    gpus: str = "",
) -> dict[str, list]:
    """Submit runs of one kind together, and record it in their folders.

    Args:
        runs: runs of the sweep.
        sweep: the sweep.
        folder: the sweep's folder.
        name: name of the jobs.
        after: SLURM only: ids of the jobs that must succeed first.
        gpus: see :class:`~region_pretrain.sweeps.state.Record`.

    Returns:
        Run id -> its submitit jobs.
    """
    jobs = {run.id: tool_jobs(run, sweep) for run in runs}
    flat = [job for of_run in jobs.values() for job in of_run]
    cluster = cluster_for(runs[0], sweep.cluster)
    submitted = iter(submit(flat, cluster, os.path.join(folder, "jobs"), name, after))
    found = {}
    for run in runs:
        mine = found[run.id] = [next(submitted) for _ in jobs[run.id]]
        before = state.read_record(run) or Record()
        logs = [str(job.paths.stdout) for job in mine]
        ids = [str(job.job_id) for job in mine]
        code = os.path.basename(sweep.root)
        state.write_record(run, Record(before.submitted + 1, ids, logs, gpus=gpus, code=code))
    return found


def live_jobs(cluster: Cluster, folder: str, user: str = "") -> dict[str, str]:
    """The jobs that are queued or running: on SLURM all of a user's, elsewhere the sweep's.

    Args:
        cluster: where the sweep's jobs run.
        folder: the sweep's folder.
        user: who started it; empty for the user of this process.

    Returns:
        Job id -> ``queued`` or ``running``.

    Raises:
        UserError: SLURM does not answer, or the sweep runs on another machine.
    """
    if cluster.kind == "slurm":
        return {
            job: state.QUEUED if word in slurm.WAITING_STATES else state.RUNNING
            for job, word in slurm.jobs_of("" if user == user_name() else user).items()
        }
    holder = holder_of(folder)
    if holder is not None and not holder.is_here():
        raise UserError(
            f"the sweep in {folder} is run by {holder}: use this command there; if that machine no "
            f"longer runs, delete {os.path.join(folder, PREFIX)}"
        )
    return dict.fromkeys(local_jobs(folder), state.RUNNING)


def waiting_reasons(sweep: SweepFile) -> dict[str, str]:
    """Why SLURM has not started a sweep's jobs: job id -> its word, e.g. ``Priority``.

    Empty elsewhere, and while SLURM does not answer.
    """
    if sweep.cluster.kind != "slurm":
        return {}
    try:
        return slurm.waiting_reasons("" if sweep.user == user_name() else sweep.user)
    except slurm.Unavailable:
        return {}


def failed_jobs(sweep: SweepFile, now: Mapping[str, str]) -> dict[str, list[str]]:
    """Ids of the runs that go on although some of their jobs have failed -> these jobs.

    Args:
        sweep: the sweep.
        now: run id -> state.
    """
    records = {
        run.id: state.read_record(run)
        for run in sweep.plan.runs.values()
        if now[run.id] in (state.RUNNING, state.QUEUED)
    }
    several = {i: record for i, record in records.items() if record and len(record.job_ids) > 1}
    live = None
    if several:
        with suppress(slurm.Unavailable):
            live = slurm.jobs_of("" if sweep.user == user_name() else sweep.user)
    runs = sweep.plan.runs
    found = {i: state.failed_jobs(runs[i], record, live) for i, record in several.items()}
    return {i: ids for i, ids in found.items() if ids}


def unrecorded(sweep: SweepFile, folder: str) -> list[str]:
    """Jobs on SLURM whose start was interrupted before it recorded them.

    submitit's file of a job shows that the sweep has submitted it.

    Raises:
        UserError: SLURM does not answer.
    """
    known = {job for record in state.all_records(folder).values() for job in record.job_ids}
    path = os.path.join(folder, "jobs")
    return [
        job
        for job in live_jobs(sweep.cluster, folder, sweep.user)
        if job not in known and JobPaths(path, job).submitted_pickle.exists()
    ]


def left_behind(sweep: SweepFile, folder: str) -> dict[str, list[str]]:
    """Folders of runs that have left the plan -> their jobs that are queued or running.

    Raises:
        UserError: see :func:`live_jobs`.
    """
    planned = {os.path.basename(run.folder) for run in sweep.plan.runs.values()}
    records = state.all_records(folder)
    live = live_jobs(sweep.cluster, folder, sweep.user)
    found = {
        path: [job for job in record.job_ids if job in live]
        for path, record in records.items()
        if os.path.basename(path) not in planned
    }
    return {path: ids for path, ids in found.items() if ids}


def local_jobs(folder: str) -> list[str]:
    """Process ids of the submitit controllers of a sweep on this machine, by their command lines.

    Args:
        folder: the sweep's folder, by any of its paths.
    """
    folder, found = os.path.realpath(os.path.join(folder, "jobs")), []
    for pid, command in command_lines().items():
        path = command.partition("submitit.local._local ")[2].strip()
        if path and os.path.realpath(path) == folder:
            found.append(str(pid))
    return found


def states_now(sweep: SweepFile, folder: str) -> dict[str, str]:
    """:func:`states` of a sweep in its folder.

    Raises:
        UserError: see :func:`live_jobs`.
    """

    def live() -> dict[str, str]:
        return live_jobs(sweep.cluster, folder, sweep.user) | _started_here(sweep, folder)

    return states(sweep.plan, live, on_slurm=sweep.cluster.kind == "slurm")


def _started_here(sweep: SweepFile, folder: str) -> dict[str, str]:
    """The job that another process runs with ``--cluster debug``: it has not recorded its end."""
    if sweep.cluster.kind != "debug":
        return {}
    holder = holder_of(folder, START_LEASE)
    if holder is None or holder.is_here() and holder.pid == os.getpid():
        return {}
    found = {}
    for path, record in state.all_records(folder).items():
        ended = {attempt["job"] for attempt in read_attempts(path) if "outcome" in attempt}
        found |= {job: state.RUNNING for job in record.job_ids if job not in ended}
    return found


def states(
    plan: Plan, live_now: Callable[[], dict[str, str]], on_slurm: bool = False
) -> dict[str, str]:
    """The state of every run.

    Args:
        plan: the runs.
        live_now: returns :func:`live_jobs`. It is called after the records have been read, as a job
            that is submitted in between would look as if it had failed; not if all are finished.
        on_slurm: the runs' disk may be that of other machines, see :func:`state.ended_state`.

    Returns:
        Run id -> state. A run of several jobs of which one has failed or was cancelled blocks those
        that depend on it, although it is ``running`` until the others end.
    """
    records = {run.id: state.read_record(run) for run in plan.runs.values()}
    done = all(map(state.is_finished, plan.runs.values()))
    live, found = {} if done else live_now(), {}
    for run in plan.runs.values():
        record = records[run.id]
        job_states = [live[j] for j in record.job_ids if j in live] if record else []
        if state.is_finished(run):
            found[run.id] = state.FINISHED
        elif state.RUNNING in job_states:
            found[run.id] = state.RUNNING
        elif job_states:
            found[run.id] = state.QUEUED
        elif record is None:
            found[run.id] = state.WAITING
        elif record.cancelled:
            found[run.id] = state.CANCELLED
        elif not record.job_ids:
            found[run.id] = state.WAITING
        else:
            found[run.id] = state.ended_state(run, record) if on_slurm else state.FAILED
    unfinished = [run for run in plan.runs.values() if found[run.id] != state.FINISHED]
    failed = {
        run.id
        for run in unfinished
        if found[run.id] == state.FAILED or state.failed_jobs(run, records[run.id], live)
    }
    for run in plan.runs.values():  # SLURM cancels the dependants of a failed job
        stuck = any(p in failed or found[p] == state.BLOCKED for p in run.parents)
        if stuck and found[run.id] == state.FAILED and not read_attempts(run.folder):
            found[run.id] = state.BLOCKED
            failed.discard(run.id)
    for blocked in state.blocked_by(plan, failed):
        if found[blocked] in (state.WAITING, state.FAILED):
            found[blocked] = state.BLOCKED
    return found
