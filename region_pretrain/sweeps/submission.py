"""Starts, resumes and cancels sweeps."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Sequence

from submitit.core.utils import environment_variables

from region_pretrain.errors import UserError
from region_pretrain.jobs import slurm
from region_pretrain.jobs.cluster import Cluster, check_cluster
from region_pretrain.jobs.executor import sbatch_text
from region_pretrain.jobs.snapshot import take_snapshot
from region_pretrain.jobs.submission import check_batch
from region_pretrain.lease import hold
from region_pretrain.shipped import ROOT
from region_pretrain.sweeps import configs, jobs, local, state
from region_pretrain.sweeps.code import describe_code, own_packages
from region_pretrain.sweeps.definition import Sweep
from region_pretrain.sweeps.earlier import describe_earlier
from region_pretrain.sweeps.graph import CONFIG, FINETUNE, PRETRAIN, TRIAL, Plan, Run, config_of
from region_pretrain.sweeps.plan import make_plan
from region_pretrain.sweeps.state import Record, SweepFile
from region_pretrain.system import user_name

Group = tuple[list[Run], list[Run]]

#: Another start of the same sweep takes seconds, and a cancellation at most as long as its jobs.
_PATIENCE_SECONDS = jobs.ENDING_SECONDS + 30.0
_POLL_SECONDS = 5.0  # each look at SLURM's queue loads its controller


def describe(sweep: Sweep, cluster: Cluster, command: str) -> SweepFile:
    """Plan a sweep, without writing or starting anything.

    Args:
        sweep: its definition.
        cluster: where its jobs run.
        command: the command line to record.

    Raises:
        UserError: a config does not build, or a value does not fit.
    """
    plan = make_plan(sweep)
    _check_batches(plan, cluster)
    # A pre-training that continues another one has seen its images as well.
    own_length = any(e.images_seen is not None or e.init_from for e in sweep.pretrain.values())
    return SweepFile(
        name=sweep.name,
        title=sweep.title or sweep.name,
        command=command,
        cluster=cluster,
        root=str(ROOT),
        cwd=os.getcwd(),
        labels=sweep.labels,
        images_seen=None if own_length else sweep.images_seen,
        plan=plan,
        pictures=sweep.pictures,
        methods=sweep.methods,
        notes=sweep.notes,
        user=user_name(),
    )


def _check_batches(plan: Plan, cluster: Cluster) -> None:
    for run in plan.runs.values():
        own = jobs.cluster_for(run, cluster)
        if run.kind in (PRETRAIN, TRIAL, FINETUNE) and own.nodes * own.tasks > 1:
            (task,) = run.tasks
            try:
                check_batch(configs.load(*config_of(task)), own)
            except UserError as error:
                raise UserError(f"{run.name}: {error}") from None


def start(sweep: SweepFile, folder: str, say: Callable[[str], None] = print) -> None:
    """Submit the runs that are missing, failed or cancelled, and no others.

    Args:
        sweep: result of :func:`describe`.
        folder: the sweep's folder.
        say: receives the lines to print.

    Raises:
        UserError: the folder belongs to another sweep, the cluster settings do not fit SLURM, or
            jobs of an earlier start still run elsewhere, or for another user.
    """
    folder = os.path.abspath(folder)
    check_cluster(sweep.cluster)
    state.claim(folder, sweep.name)
    with hold(folder, jobs.START_LEASE, patience=_PATIENCE_SECONDS):
        _start(sweep, folder, say)


def _start(sweep: SweepFile, folder: str, say: Callable[[str], None]) -> None:
    _refuse_jobs_elsewhere(sweep, folder)
    unknown = jobs.unrecorded(sweep, folder) if sweep.cluster.kind == "slurm" else []
    if unknown:
        say(f"cancelling {len(unknown)} jobs of an interrupted start: {' '.join(unknown)}")
        slurm.cancel(unknown)
    _wait_for_cancelled(sweep, folder, unknown, say)
    before = jobs.states_now(sweep, folder)
    # Later edits of the code and of configs do not affect the runs that wait.
    tasks = [task for run in sweep.plan.runs.values() for task in run.tasks]
    used = [config_of(task)[0] for task in tasks if CONFIG in task]
    copies = configs.freeze(used, os.path.join(folder, "configs"))
    root = take_snapshot(folder, own_packages(sweep.plan))
    sweep = dataclasses.replace(sweep, root=root, configs=copies)
    state.write_sweep(folder, sweep)
    for run in sweep.plan.runs.values():  # not before: a coordinator would start the earlier code
        if before[run.id] in (state.FAILED, state.CANCELLED):
            state.write_record(run, Record(state.read_record(run).submitted))
    now = jobs.states_now(sweep, folder)
    for line in describe_earlier(sweep.plan) + describe_code(sweep.plan, root):
        say(line)
    if left := jobs.left_behind(sweep, folder):
        names = ", ".join(os.path.basename(path) for path in left)
        say(
            f"still queued or running, though the sweep no longer contains them: {names}; to stop "
            f"them as well, cancel the sweep: tools/sweep.py cancel {folder}"
        )
    for i, ids in jobs.failed_jobs(sweep, now).items():
        run = sweep.plan.runs[i]
        count = len(state.read_record(run).job_ids)
        say(
            f"{run.name}: {len(ids)} of {count} jobs failed: start the sweep again when the others "
            "have ended"
        )
    say(f"{folder}: {len(now)} runs: {state.counted(now)}")
    if sweep.cluster.kind == "slurm":
        _submit_slurm(sweep, folder, now)
    elif sweep.cluster.kind == "debug":
        _run_here(sweep, folder, say)
    elif any(word != state.FINISHED for word in now.values()):
        local.start_coordinator(folder)


def _refuse_jobs_elsewhere(sweep: SweepFile, folder: str) -> None:
    """A start must not run what the jobs of an earlier one run, somewhere else or for another."""
    path = os.path.join(folder, "sweep.json")
    before = state.read_sweep(folder) if os.path.exists(path) else sweep
    if before.cluster.kind == sweep.cluster.kind and before.user in ("", sweep.user):
        return
    unfinished = [run for run in before.plan.runs.values() if not state.is_finished(run)]
    records = {run.name: state.read_record(run) for run in unfinished}
    ids = {job: name for name, record in records.items() if record for job in record.job_ids}
    if not ids:
        return
    where = f"cluster={before.cluster.kind}, user={before.user or 'unknown'}"
    try:
        live = jobs.live_jobs(before.cluster, folder, before.user)
    except slurm.Unavailable as error:
        raise UserError(
            f"the sweep in {folder} was started with {where}, and whether its jobs still run is "
            f"unknown here: {error}; start it there, or delete {path} if they do not"
        ) from error
    names = sorted({ids[job] for job in live if job in ids})
    if not names and before.cluster.kind == "local" and local.coordinator_pid(folder) is not None:
        names = [run.name for run in unfinished]  # between two jobs
    if names:
        raise UserError(
            f"jobs of the sweep in {folder}, started with {where}, are queued or running: "
            f"{', '.join(names)}; start it in the same way, or cancel it first"
        )


def _wait_for_cancelled(
    sweep: SweepFile, folder: str, unknown: Sequence[str], say: Callable[[str], None]
) -> None:
    """Wait until cancelled jobs have ended: until then they hold their runs' folders.

    Args:
        sweep: the sweep.
        folder: its folder.
        unknown: cancelled jobs that are in no record.
        say: receives the line to print.

    Raises:
        UserError: they do not end.
    """
    records = filter(None, map(state.read_record, sweep.plan.runs.values()))
    ids = {job for record in records if record.cancelled for job in record.job_ids} | {*unknown}
    deadline, said = time.monotonic() + jobs.ENDING_SECONDS, False
    on_slurm = sweep.cluster.kind == "slurm"
    while ids and (still := ids & jobs.live_jobs(sweep.cluster, folder, sweep.user).keys()):
        if time.monotonic() > deadline:
            raise UserError(
                f"cancelled jobs of the sweep in {folder} have not ended: "
                f"{', '.join(sorted(still))}; start it again when they have"
            )
        if not said:
            say(f"waiting for {len(still)} cancelled jobs to end")
            said = True
        time.sleep(_POLL_SECONDS if on_slurm else 1.0)


def missing(plan: Plan, now: dict[str, str]) -> list[Group]:
    """The runs to submit to SLURM, grouped into job arrays.

    Args:
        plan: the runs.
        now: the states of those to look at.

    Returns:
        Pairs (runs of one kind, the unfinished runs that all of them depend on).
    """
    kept = (state.FINISHED, state.RUNNING, state.QUEUED)
    groups: dict[tuple, Group] = {}
    depth: dict[str, int] = {}
    for run in plan.runs.values():
        if now.get(run.id, state.QUEUED) in kept:
            continue
        after = [plan.runs[p] for p in run.parents if now[p] != state.FINISHED]
        depth[run.id] = 1 + max((depth.get(p.id, 0) for p in after), default=0)
        key = (depth[run.id], run.kind, tuple(p.id for p in after))
        groups.setdefault(key, ([], after))[0].append(run)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _submit_slurm(sweep: SweepFile, folder: str, now: dict[str, str]) -> None:
    # What is still blocked waits for a run of which a job has failed while others run.
    groups = missing(sweep.plan, {i: word for i, word in now.items() if word != state.BLOCKED})
    for i, (runs, after) in enumerate(groups):
        ids = [job for run in after for job in state.read_record(run).job_ids]
        try:
            jobs.submit_runs(runs, sweep, folder, _group_name(sweep, runs), ids)
        except UserError as error:
            counts = [len(runs) for runs, _ in groups]
            raise UserError(
                f"{error}; {sum(counts[:i])} of {sum(counts)} runs have been submitted: start the "
                "sweep again to submit the others"
            ) from error


def _group_name(sweep: SweepFile, runs: Sequence[Run]) -> str:
    return f"{sweep.name}:{runs[0].name if len(runs) == 1 else runs[0].kind}"


def _run_here(sweep: SweepFile, folder: str, say: Callable[[str], None]) -> None:
    for run in sweep.plan.runs.values():
        if state.is_finished(run):
            continue
        if not all(state.is_finished(sweep.plan.runs[p]) for p in run.parents):
            say(f"[{run.name}] cannot start: a run that it depends on has failed")
            continue
        say(f"[{run.name}]")
        for job in jobs.submit_runs([run], sweep, folder, run.name)[run.id]:
            # result() would open a debugger, and exception() does not set the environment.
            names = environment_variables(SUBMITIT_DEBUG_JOB_ID=job.job_id)
            with slurm.outside_allocation(), names:
                error = job.exception()
            if error is not None:
                say(f"[{run.name}] failed: {error}")


def dry_run(sweep: SweepFile, folder: str) -> str:
    """The commands of all unfinished runs, and on SLURM their sbatch files.

    It begins with the runs that have been computed with other settings, if any.
    """
    folder = os.path.abspath(folder)
    here = os.path.exists(os.path.join(folder, "sweep.json")) and sweep.cluster.kind != "slurm"
    now = jobs.states_now(sweep, folder) if here else jobs.states(sweep.plan, dict)
    lines = [f"# {line}" for line in describe_earlier(sweep.plan)]
    parts = ["\n".join(lines)] if lines else []
    for runs, after in missing(sweep.plan, now):
        commands = [(run, job) for run in runs for job in jobs.tool_jobs(run, sweep)]
        parts += [
            f"# {run.name}"
            + (f" (after {', '.join(a.name for a in after)})" if after else "")
            + f"\n{shlex.join(job.command())}"
            for run, job in commands
        ]
        if sweep.cluster.kind == "slurm":
            cluster = jobs.cluster_for(runs[0], sweep.cluster)
            name, ids = _group_name(sweep, runs), [f"<{run.name}>" for run in after]
            flat = [job for _, job in commands]
            parts.append(sbatch_text(flat, cluster, os.path.join(folder, "jobs"), name, ids))
    return "\n\n".join(parts)


def cancel(folder: str, say: Callable[[str], None] = print) -> list[str]:
    """Cancel a sweep's jobs; :func:`start` resumes them.

    Args:
        folder: the sweep's folder.
        say: receives the lines to print while jobs of this machine save their checkpoints.

    Returns:
        Names of the runs that were queued or running.

    Raises:
        UserError: the folder contains no sweep.
    """
    folder = os.path.abspath(folder)
    sweep = state.read_sweep(folder)
    if sweep.cluster.kind == "debug":  # its start holds the lease as long as it runs
        return local.cancel_local(folder, say)
    with hold(folder, jobs.START_LEASE, patience=_PATIENCE_SECONDS):
        if sweep.cluster.kind == "local":
            return local.cancel_local(folder, say)
        return _cancel_slurm(state.read_sweep(folder), folder)


def _cancel_slurm(sweep: SweepFile, folder: str) -> list[str]:
    live = jobs.live_jobs(sweep.cluster, folder, sweep.user)
    mine = []
    for run in sweep.plan.runs.values():
        record = state.read_record(run)
        if record and any(job in live for job in record.job_ids):
            mine.append((run, record))
    others, unknown = jobs.left_behind(sweep, folder), jobs.unrecorded(sweep, folder)
    ids = [job for _, record in mine for job in record.job_ids if job in live]
    ids += [job for left in others.values() for job in left] + unknown
    if ids:
        slurm.cancel(ids)
    for run, record in mine:
        state.write_record(run, dataclasses.replace(record, cancelled=True))
    names = [run.name for run, _ in mine] + [os.path.basename(path) for path in others]
    return names + [f"job {job}" for job in unknown]
