"""The coordinator: a background process that runs a sweep's jobs on this machine.

Its state is in files only: killed and restarted, it finds the running jobs and continues.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO

from region_pretrain.sweeps import jobs, state
from region_pretrain.sweeps.state import SweepFile

logger = logging.getLogger(__name__)

_LOCK = "coordinator.lock"
LOG = "coordinator.txt"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 15.0


def _open_lock(folder: str) -> IO[str] | None:
    """The sweep's lock, which the kernel releases when its holder dies; None if it is taken."""
    file = open(os.path.join(folder, _LOCK), "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def coordinator_pid(folder: str) -> int | None:
    """Process id of a sweep's coordinator; None if none is running."""
    path = os.path.join(folder, _LOCK)
    if not os.path.exists(path):
        return None
    mine = _open_lock(folder)
    if mine is not None:
        mine.close()
        return None
    with open(path, encoding="utf-8") as file:
        text = file.read().strip()
    return int(text) if text.isdigit() else None


def start_coordinator(folder: str) -> None:
    """Start the coordinator in its own session. A running one picks up new runs automatically."""
    lock = _open_lock(folder)
    if lock is None:
        return
    # The process inherits the locked file, so the lock is never free in between.
    with lock, open(os.path.join(folder, LOG), "ab") as log:
        lock.truncate(0)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, folder, str(lock.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=state.read_sweep(folder).root,
            pass_fds=[lock.fileno()],
        )
        lock.write(f"{process.pid}\n")


def coordinate(folder: str, lock: IO[str]) -> None:
    """Run everything that is not finished, parents first, until nothing more can run.

    Args:
        folder: the sweep's folder.
        lock: the sweep's lock, which this process holds; released at the end.
    """
    while True:
        _work(folder)
        fcntl.flock(lock, fcntl.LOCK_UN)
        # The sweep may have been started again since the last check.
        sweep = state.read_sweep(folder)
        if not _startable(sweep, jobs.states(sweep.plan, jobs.live_jobs(sweep.cluster, folder))):
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
    while True:
        sweep = state.read_sweep(folder)
        runs = sweep.plan.runs
        mine = [job for job in mine if not job.done()]
        now = jobs.states(sweep.plan, jobs.live_jobs(sweep.cluster, folder))
        for name, word in now.items():
            if word not in (state.WAITING, seen.get(name)):
                logger.info("%s: %s", runs[name].name, word)
        seen = now
        running = sum(word == state.RUNNING for word in now.values())
        ready = _startable(sweep, now)
        if not running and not ready:
            return
        for name in ready[: max(0, sweep.cluster.jobs - running)]:
            mine += jobs.submit_runs([runs[name]], sweep, folder, runs[name].name)[name]
        time.sleep(_POLL_SECONDS)


def cancel_local(folder: str) -> list[str]:
    """Stop a sweep's coordinator and its jobs.

    Returns:
        Names of the stopped runs. They resume from their checkpoints when started again.
    """
    sweep = state.read_sweep(folder)
    if (pid := coordinator_pid(folder)) is not None:
        os.kill(pid, signal.SIGTERM)
        _wait_until(lambda: coordinator_pid(folder) is None)
    live = jobs.live_jobs(sweep.cluster, folder)
    stopped = []
    for run in sweep.plan.runs.values():
        record = state.read_record(run)
        pids = [int(j) for j in record.job_ids if j in live] if record else []
        if pids:
            state.write_record(run, dataclasses.replace(record, cancelled=True))
            stopped.append(run.name)
        for job in pids:
            os.kill(job, signal.SIGINT)  # submitit's controller then ends its tasks
    _wait_until(lambda: not jobs.live_jobs(sweep.cluster, folder))
    return stopped


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> None:
    # Background jobs of a shell ignore SIGINT, and so would their children; it cancels a job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder, number = sys.argv[1:]
    with open(int(number), "a", encoding="utf-8") as lock:
        os.set_inheritable(lock.fileno(), False)
        coordinate(folder, lock)


if __name__ == "__main__":
    main()
