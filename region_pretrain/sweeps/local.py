"""The coordinator: a background process that runs a sweep's jobs on this machine.

Its state is in files only: killed and restarted, it finds the running jobs and continues.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress

from submitit.core.utils import JobPaths, environment_variables

from region_pretrain.errors import exit_on_user_error
from region_pretrain.jobs.attempts import read_attempts, start_attempt, vanished
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.lease import InUse, hold, holder_of
from region_pretrain.sweeps import jobs, state
from region_pretrain.sweeps.graph import FINETUNE, TRIAL, Run
from region_pretrain.sweeps.state import Record, SweepFile
from region_pretrain.system import gpus

logger = logging.getLogger(__name__)

LOG = "coordinator.txt"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 15.0
_SAY_SECONDS, _SAY_EVERY_SECONDS = 2.0, 15.0  # most jobs end within the first
_MAX_KILLED = 3  # times in a row without a new checkpoint


def coordinator_pid(folder: str) -> int | None:
    """Process id of a sweep's coordinator; None if none is running on this machine."""
    holder = holder_of(folder)
    return holder.pid if holder is not None and holder.is_here() else None


def start_coordinator(folder: str) -> None:
    """Start the coordinator in its own session. A running one picks up new runs automatically."""
    if coordinator_pid(folder) is not None:
        return
    with open(os.path.join(folder, LOG), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, folder],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=state.read_sweep(folder).root,
        )
    # Until then, the sweep looks as if its process had been killed.
    _wait_until(lambda: coordinator_pid(folder) is not None or process.poll() is not None, 60)


def coordinate(folder: str) -> None:
    """Run everything that is not finished, parents first, until nothing more can run.

    Args:
        folder: the sweep's folder.
    """
    while True:
        try:
            with hold(folder):
                _work(folder)
        except InUse:
            return  # by another coordinator
        # The sweep may have been started again since the last check.
        sweep = state.read_sweep(folder)
        if not _startable(sweep, jobs.states_now(sweep, folder)):
            return


def _startable(sweep: SweepFile, now: Mapping[str, str]) -> list[str]:
    """Ids of the runs whose parents are finished."""
    return [
        run.id
        for run in sweep.plan.runs.values()
        if now[run.id] == state.WAITING and all(now[p] == state.FINISHED for p in run.parents)
    ]


def _work(folder: str) -> None:
    seen: dict[str, str] = {}
    mine: list = []  # polled with done(), which reaps finished child processes
    devices = gpus()
    while True:
        sweep = state.read_sweep(folder)
        runs = sweep.plan.runs
        mine = [job for job in mine if not job.done()]
        now = jobs.states_now(sweep, folder)
        killed = [run for run in runs.values() if now[run.id] == state.FAILED]
        killed = [run for run in killed if _was_killed(run, folder)]
        for run in killed:
            logger.info("%s: killed; starting it again", run.name)
            state.write_record(run, Record(state.read_record(run).submitted))
        if killed:
            continue
        for name, word in now.items():
            if word not in (state.WAITING, seen.get(name)):
                logger.info("%s: %s", runs[name].name, word)
        seen = dict(now)
        running = sum(word == state.RUNNING for word in now.values())
        ready = _startable(sweep, now)
        if not running and not ready:
            return
        if ready and state.read_sweep(folder) != sweep:
            continue  # it has just been started again
        gone = jobs.left_behind(sweep, folder) if ready else {}
        records = state.all_records(folder) if gone else {}
        left = [records[path].gpus for path in gone]  # of runs that have left the plan
        for name in ready:
            run, count = runs[name], _processes(runs[name], sweep.cluster)
            started = [runs[n] for n, word in now.items() if word == state.RUNNING]
            # Those of running jobs are in their records: another coordinator may have started them.
            busy = [state.read_record(run).gpus for run in started] + left
            others = sum(_processes(run, sweep.cluster) for run in started)
            others += len(left) * sweep.cluster.tasks
            if others + count > sweep.cluster.jobs * sweep.cluster.tasks:
                break  # smaller ones do not overtake it: it might wait for ever
            with _on_free_gpus(devices, count, busy) as group:
                mine += jobs.submit_runs([run], sweep, folder, run.name, gpus=group)[name]
            now[name] = state.RUNNING
        time.sleep(_POLL_SECONDS)


def _processes(run: Run, cluster: Cluster) -> int:
    """A run's part of the processes that may run at once."""
    fine = run.kind in (TRIAL, FINETUNE)
    return jobs.cluster_for(run, cluster).tasks if fine else cluster.tasks


@contextmanager
def _on_free_gpus(devices: Sequence[str], count: int, busy: Sequence[str]) -> Iterator[str]:
    """Let a job see only the GPUs that the fewest running jobs use.

    Args:
        devices: the machine's.
        count: GPUs per job.
        busy: what this has yielded for each running job.

    Yields:
        Their value of ``CUDA_VISIBLE_DEVICES``. With a single group of GPUs nothing changes.
    """
    used = Counter(device for group in busy for device in group.split(","))
    groups = [devices[i : i + count] for i in range(0, len(devices) - count + 1, count)]
    # Neighbours are connected best; the GPUs that are free may be no neighbours.
    options = [*groups, sorted(devices, key=used.__getitem__)[:count]] if groups else [()]
    group = ",".join(min(options, key=lambda option: sum(used[device] for device in option)))
    with environment_variables(CUDA_VISIBLE_DEVICES=group) if len(groups) > 1 else nullcontext():
        yield group


def _was_killed(run: Run, folder: str) -> bool:
    """Whether the process beside the run's tool was killed, so that the run can be started again.

    A tool that was killed alone has been started again already, by the process beside it.
    """
    (job,) = state.read_record(run).job_ids
    attempts = read_attempts(run.folder)
    known = any(attempt["job"] == job for attempt in attempts)
    if not known and not JobPaths(os.path.join(folder, "jobs"), job).result_pickle.exists():
        # It was killed before it could record the attempt. A process that fails leaves a result.
        start_attempt(run.folder, job, 0, socket.gethostname())
        attempts = read_attempts(run.folder)
    return 0 < vanished(attempts) < _MAX_KILLED


def cancel_local(folder: str, say: Callable[[str], None] = print) -> list[str]:
    """Stop a sweep's coordinator and its jobs, which save a checkpoint before they end.

    Args:
        folder: the sweep's folder.
        say: receives the lines to print while it waits for them.

    Returns:
        Names of the stopped runs. They resume from their checkpoints when started again.
    """
    sweep = state.read_sweep(folder)
    jobs.live_jobs(sweep.cluster, folder)  # refuses a sweep of another machine
    if (pid := coordinator_pid(folder)) is not None:
        os.kill(pid, signal.SIGTERM)
        _wait_until(lambda: coordinator_pid(folder) is None)
    # Only what their own command lines identify is signalled: ids may be those of another queue.
    unknown = set(jobs.local_jobs(folder))
    others = jobs.left_behind(sweep, folder)
    stopped = [os.path.basename(path) for path, left in others.items() if unknown & set(left)]
    unknown -= {job for left in others.values() for job in left}
    for run in sweep.plan.runs.values():
        record = state.read_record(run)
        if record and not unknown.isdisjoint(record.job_ids):
            unknown -= set(record.job_ids)
            if not state.is_finished(run):  # its process is still ending
                state.write_record(run, dataclasses.replace(record, cancelled=True))
                stopped.append(run.name)
    # The coordinator has started these, and ended before it recorded that.
    stopped += [f"job {job}" for job in sorted(unknown)]
    _stop_jobs(lambda: jobs.local_jobs(folder), say)
    return stopped


def _stop_jobs(live: Callable[[], list[str]], say: Callable[[str], None]) -> None:
    """Let jobs save their checkpoints and end; end those that do not.

    Args:
        live: returns the ids of those that run.
        say: receives the lines to print.
    """
    began = time.monotonic()
    due = began + _SAY_SECONDS
    while still := live():
        now = time.monotonic()
        if now > began + jobs.ENDING_SECONDS:
            say(f"stopping {len(still)} jobs that have not ended")
            _signal(still, signal.SIGINT)  # submitit's controller then ends its tasks
            _wait_until(lambda: not live())
            return
        if now > due:
            left = began + jobs.ENDING_SECONDS - now
            say(f"waiting up to {left:.0f} s for {len(still)} jobs to save their checkpoints")
            due = now + _SAY_EVERY_SECONDS
        _signal(still, signal.SIGTERM)  # again and again, as a task may have been starting
        time.sleep(_POLL_SECONDS)


def _signal(pids: Iterable[str], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), number)


def _wait_until(condition: Callable[[], bool], seconds: float = _GRACE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


@exit_on_user_error
def main() -> None:
    # Background jobs of a shell ignore SIGINT, and so would their children; it cancels a job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    coordinate(sys.argv[1])


if __name__ == "__main__":
    main()
