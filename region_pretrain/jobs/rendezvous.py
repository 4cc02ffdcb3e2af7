"""The address at which the processes of a job find one another."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import time

import submitit

from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.jobs.slurm import restart_count
from region_pretrain.system import process_start

#: Below the ports that Linux uses for outgoing connections (from 32768).
_PORTS = range(10000, 32000)
_PATIENCE_SECONDS = 300.0  # for the first task of a job on this machine
_POLL_SECONDS = 0.1


def rank_environment(env: submitit.JobEnvironment, folder: str) -> dict[str, str | None]:
    """The environment variables from which ``torch.distributed`` finds the other ranks.

    Args:
        env: the task's environment.
        folder: of the job's logs.

    Returns:
        Variable -> value for :func:`region_pretrain.jobs.child.start_child`. In a job of one task
        the variables are removed (None).

    Raises:
        UserError: the first task of a local job has not started.
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
            "MASTER_PORT": str(_port_of(env, folder)),
        }
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    if cpus and "OMP_NUM_THREADS" not in os.environ:
        ranks["OMP_NUM_THREADS"] = cpus
    return ranks


def port(job_id: str) -> int:
    """A port that all ranks of an attempt on SLURM compute alike.

    It changes with every attempt, so that no rank meets a process or a store that the previous
    attempt left behind.
    """
    return _hashed(job_id, restart_count(), os.environ.get("SLURM_STEP_ID", ""))


def _hashed(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return _PORTS[int.from_bytes(digest[:8], "big") % len(_PORTS)]


def _port_of(env: submitit.JobEnvironment, folder: str) -> int:
    """The port of a task's job; on this machine one that is free, which the first task chooses."""
    if env.cluster != "local":
        return port(env.raw_job_id)
    path = os.path.join(folder, "tasks", f"{env.job_id}_port.json")
    if env.global_rank == 0:
        me = {"pid": os.getpid(), "started": process_start(os.getpid())}
        number = next(filter(_is_free, (_hashed(*me.values(), i) for i in itertools.count())))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_text_atomic(path, json.dumps({**me, "port": number}))
        return number
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                first = json.load(file)
            if process_start(first["pid"]) == first["started"]:  # not that of an earlier attempt
                return first["port"]
        time.sleep(_POLL_SECONDS)
    raise UserError(
        f"rank 0 of job {env.job_id} has not started within {_PATIENCE_SECONDS:g} s: see its log"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


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
