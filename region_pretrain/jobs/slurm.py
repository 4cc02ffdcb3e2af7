"""SLURM's commands: no other module of the library runs them.

A command that is missing, fails or does not answer in time raises :class:`Unavailable`.
Nothing here imports PyTorch: it runs in a process beside every training process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from region_pretrain.errors import UserError

T = TypeVar("T")

#: Variables that a user sets for SLURM's commands, as opposed to those that describe a job.
_SETTINGS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
#: Beginnings of the variables that SLURM, its MPI support and submitit set in a job.
_ALLOCATION = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
_ALLOCATION += ("SUBMITIT_", "PMI_", "PMIX_")
#: Variables by which the processes of a job find one another.
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: The states of a job that has not started, or that waits to be started again.
WAITING_STATES = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


class Unavailable(UserError):
    """SLURM does not answer, or one of its commands fails."""


def patiently(
    ask: Callable[[], T],
    say: Callable[[str], None] = print,
    seconds: float = 10,
    times: int | None = 6,
) -> T:
    """Ask SLURM again while it is unavailable, such as while its controller restarts.

    Args:
        ask: calls functions of this module.
        say: receives the first error.
        seconds: between two attempts.
        times: number of attempts; None for any number.

    Raises:
        Unavailable: that of the last attempt.
    """
    done = 0
    while True:
        try:
            return ask()
        except Unavailable as error:
            done += 1
            if done == times:
                raise
            if done == 1:
                say(f"{error}; asking again every {seconds:g} s")
            time.sleep(seconds)


def require_commands() -> None:
    """Raise an error on a machine that cannot submit jobs."""
    for command in ("sbatch", "srun", "sinfo", "squeue", "scontrol", "scancel"):
        if shutil.which(command) is None:
            raise UserError(
                f"no {command} on this machine: use --slurm on a login node of a SLURM cluster; "
                "--dry-run shows what would be submitted"
            )


def list_partitions() -> list[str]:
    """The names of the cluster's partitions, also of hidden ones."""
    return list(dict.fromkeys(_run("sinfo", "--all", "--noheader", "--format=%R").split()))


def jobs_of(user: str = "") -> dict[str, str]:
    """A user's jobs in the queue: id -> state, e.g. ``{"7_0": "RUNNING"}``.

    Each task of an array counts as a job.

    Args:
        user: a name; empty for the user of this process.
    """
    whose = f"--user={user}" if user else "--me"
    command = ("squeue", whose, "--all", "--noheader", "--array", "--format=%i %T")
    return dict(line.split() for line in _run(*command).splitlines() if line.strip())


def waiting_reasons(user: str = "") -> dict[str, str]:
    """Why a user's jobs have not started: id -> SLURM's word, e.g. ``{"9": "Priority"}``.

    Args:
        user: see :func:`jobs_of`.
    """
    whose = f"--user={user}" if user else "--me"
    command = ("squeue", whose, "--all", "--states=PENDING", "--noheader", "--array")
    command += ("--format=%i %r",)
    return dict(line.split(maxsplit=1) for line in _run(*command).splitlines() if " " in line)


def job_state(job_id: str) -> str:
    """The state of a job, e.g. ``RUNNING``; "" if it has left the queue."""
    command = ("squeue", "--all", "--noheader", "--format=%T", f"--jobs={job_id}")
    try:
        return _run(*command, seconds=30).strip()
    except Unavailable as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def requeue(job_id: str) -> None:
    """Put a running job back in the queue."""
    _run("scontrol", "requeue", job_id, seconds=120)


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs."""
    _run("scancel", *job_ids, seconds=120)


@contextmanager
def outside_allocation() -> Iterator[None]:
    """Hide the variables of an allocation that this process runs in, and those of ``torchrun``.

    ``sbatch``, the new job and its ``srun`` would otherwise inherit the allocation's tasks, cores
    and memory, and a local run would take itself for one of its tasks. A ``MASTER_ADDR`` that an
    earlier run left in the shell would misdirect the ranks. The user's own settings stay:
    :data:`_SETTINGS`, and the options of ``sbatch`` in ``SBATCH_*``.
    """
    inside = "SLURM_JOB_ID" in os.environ or "SLURM_JOBID" in os.environ
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name in _RENDEZVOUS
        or (inside and name.startswith(_ALLOCATION) and name not in _SETTINGS)
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def restart_count() -> int:
    """How often SLURM has restarted the job that this process belongs to."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _run(*command: str, seconds: float = 60) -> str:
    """The standard output of a command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Unavailable(
            f"{command[0]} does not answer within {seconds} s: is slurmctld running?"
        ) from None
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
