"""Where the processes of a job meet, from what the job itself knows, and what SLURM says of it."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess

import submitit

#: Below the ports that Linux hands out to connections (from 32768).
_PORTS = range(10000, 32000)


def restart_count() -> int:
    """How often SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def job_state(job_id: str) -> str | None:
    """The state that ``squeue`` gives a job, e.g. ``RUNNING``; None where it does not answer."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def rank_environment(env: submitit.JobEnvironment) -> dict[str, str | None]:
    """The variables by which ``torch.distributed`` finds the other ranks.

    The port is another one in each attempt: what is left of the attempt before, a rank that has
    not died yet or a store that still listens, is never met.

    Args:
        env: of this task.

    Returns:
        For :func:`region_pretrain.jobs.child.start_child`; a job of one task has no use for them.
    """
    if env.num_tasks == 1:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        ranks: dict[str, str | None] = dict.fromkeys(names)
    else:
        ranks = {
            "RANK": str(env.global_rank),
            "WORLD_SIZE": str(env.num_tasks),
            "LOCAL_RANK": str(env.local_rank),
            "LOCAL_WORLD_SIZE": str(env.num_tasks // env.num_nodes),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_host(env),
            "MASTER_PORT": str(port(env.raw_job_id)),
        }
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    if cpus and "OMP_NUM_THREADS" not in os.environ:
        ranks["OMP_NUM_THREADS"] = cpus
    return ranks


def port(job_id: str) -> int:
    """A port that all ranks of an attempt, and hardly any other attempt, come to."""
    parts = (job_id, str(restart_count()), os.environ.get("SLURM_STEP_ID", ""))
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return _PORTS[int.from_bytes(digest[:8], "big") % len(_PORTS)]


def _first_host(env: submitit.JobEnvironment) -> str:
    if env.cluster == "local":
        return "127.0.0.1"
    host = env.hostnames[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:  # a node's name need not be its host's; the batch script runs on the first
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host
