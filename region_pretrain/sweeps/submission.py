"""Starts, resumes and cancels sweeps."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Sequence

from submitit.core.utils import environment_variables

from region_pretrain.jobs import slurm
from region_pretrain.jobs.cluster import Cluster, check_cluster
from region_pretrain.jobs.executor import sbatch_text
from region_pretrain.jobs.snapshot import take_snapshot
from region_pretrain.lease import PREFIX, hold
from region_pretrain.shipped import ROOT
from region_pretrain.sweeps import jobs, local, state
from region_pretrain.sweeps.definition import Sweep
from region_pretrain.sweeps.earlier import describe_earlier
from region_pretrain.sweeps.graph import Plan, Run
from region_pretrain.sweeps.plan import make_plan
from region_pretrain.sweeps.state import Record, SweepFile

Group = tuple[list[Run], list[Run]]

_PATIENCE_SECONDS = 60.0  # another start of the same sweep takes seconds


def describe(sweep: Sweep, cluster: Cluster, command: str) -> SweepFile:
    """Plan a sweep, without writing or starting anything.

    Args:
        sweep: its definition.
        cluster: where its jobs run.
        command: the command line to record.

    Raises:
        UserError: a config does not build, or a value does not fit.
    """
    own_length = any(entry.images_seen is not None for entry in sweep.pretrain.values())
    return SweepFile(
        name=sweep.name,
        title=sweep.title or sweep.name,
        command=command,
        cluster=cluster,
        root=str(ROOT),
        cwd=os.getcwd(),
        labels=sweep.labels,
        images_seen=None if own_length else sweep.images_seen,
        plan=make_plan(sweep),
        pictures=sweep.pictures,
        methods=sweep.methods,
        notes=sweep.notes,
    )


def start(sweep: SweepFile, folder: str, say: Callable[[str], None] = print) -> None:
    """Submit the runs that are missing, failed or cancelled, and no others.

    Args:
        sweep: result of :func:`describe`.
        folder: the sweep's folder.
        say: receives the lines to print.

    Raises:
        UserError: the folder belongs to another sweep, or the cluster settings do not fit SLURM.
    """
    folder = os.path.abspath(folder)
    check_cluster(sweep.cluster)
    state.claim(folder, sweep.name)
    with hold(folder, f"{PREFIX}-start", patience=_PATIENCE_SECONDS):
        _start(sweep, folder, say)


def _start(sweep: SweepFile, folder: str, say: Callable[[str], None]) -> None:
    now = jobs.states_now(sweep, folder)
    for run in sweep.plan.runs.values():
        if now[run.id] in (state.FAILED, state.CANCELLED):
            state.write_record(run, Record(state.read_record(run).submitted))
    now = jobs.states_now(sweep, folder)
    # Later edits of the code do not affect the runs that wait.
    sweep = dataclasses.replace(sweep, root=take_snapshot(folder))
    state.write_sweep(folder, sweep)
    for line in describe_earlier(sweep.plan):
        say(line)
    say(f"{folder}: {len(now)} runs: {state.counted(now)}")
    if sweep.cluster.kind == "slurm":
        _submit_slurm(sweep, folder, now)
    elif sweep.cluster.kind == "debug":
        _run_here(sweep, folder, say)
    elif any(word != state.FINISHED for word in now.values()):
        local.start_coordinator(folder)


def missing(plan: Plan, now: dict[str, str]) -> list[Group]:
    """The runs to submit to SLURM, grouped into job arrays.

    Args:
        plan: the runs.
        now: their states.

    Returns:
        Pairs (runs of one kind, the unfinished runs that all of them depend on).
    """
    kept = (state.FINISHED, state.RUNNING, state.QUEUED)
    groups: dict[tuple, Group] = {}
    depth: dict[str, int] = {}
    for run in plan.runs.values():
        if now[run.id] in kept:
            continue
        after = [plan.runs[p] for p in run.parents if now[p] != state.FINISHED]
        depth[run.id] = 1 + max((depth.get(p.id, 0) for p in after), default=0)
        key = (depth[run.id], run.kind, tuple(p.id for p in after))
        groups.setdefault(key, ([], after))[0].append(run)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _submit_slurm(sweep: SweepFile, folder: str, now: dict[str, str]) -> None:
    for runs, after in missing(sweep.plan, now):
        ids = [job for run in after for job in state.read_record(run).job_ids]
        jobs.submit_runs(runs, sweep, folder, _group_name(sweep, runs), ids)


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


def cancel(folder: str) -> list[str]:
    """Cancel a sweep's jobs; :func:`start` resumes them.

    Returns:
        Names of the runs that were queued or running.

    Raises:
        UserError: the folder contains no sweep.
    """
    folder = os.path.abspath(folder)
    sweep = state.read_sweep(folder)
    if sweep.cluster.kind != "slurm":
        return local.cancel_local(folder)
    live = jobs.live_jobs(sweep.cluster, folder)
    stopped, ids = [], []
    for run in sweep.plan.runs.values():
        record = state.read_record(run)
        mine = [job for job in record.job_ids if job in live] if record else []
        if mine:
            ids += mine
            stopped.append(run.name)
            record.cancelled = True
            state.write_record(run, record)
    if ids:
        slurm.cancel(ids)
    return stopped
