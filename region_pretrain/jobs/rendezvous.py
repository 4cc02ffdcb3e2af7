"""The address at which the processes of a job find one another."""

from __future__ import annotations

import hashlib
import os
import socket

import submitit

from region_pretrain.jobs.slurm import restart_count

#: Below the ports that Linux uses for outgoing connections (from 32768).
_PORTS = range(10000, 32000)


def rank_environment(env: submitit.JobEnvironment) -> dict[str, str | None]:
    """The environment variables from which ``torch.distributed`` finds the other ranks.

    Args:
        env: the task's environment.

    Returns:
        Variable -> value for :func:`region_pretrain.jobs.child.start_child`. In a job of one task
        the variables are removed (None).
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
    """A port that all ranks of an attempt compute alike.

    It changes with every attempt, so that no rank meets a process or a store that the previous
    attempt left behind.
    """
    parts = (job_id, str(restart_count()), os.environ.get("SLURM_STEP_ID", ""))
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return _PORTS[int.from_bytes(digest[:8], "big") % len(_PORTS)]


def _first_host(env: submitit.JobEnvironment) -> str:
    if env.cluster == "local":
        return "127.0.0.1"
    host = env.hostnames[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        # A SLURM node name need not be a host name; the batch script runs on the first node.
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host
