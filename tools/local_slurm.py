#!/usr/bin/env python
"""Run a command with a real SLURM of several nodes, all of them on this machine.

tools/local_slurm.py -- bash       # then: sinfo, tools/pretrain_net.py --slurm ..., squeue
tools/local_slurm.py --nodes 3 -- python my_test.py
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.jobs.child import following_parent

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

# A requeued job waits for `cred_expire` seconds: 120 by default, and at least 5.
_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
MpiDefault=none
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} \
 RealMemory={memory}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing_commands() -> list[str]:
    """Programs of SLURM and munge that are not installed."""
    return [name for name in _COMMANDS if shutil.which(name, path=_PATH) is None]


@contextlib.contextmanager
def local_slurm(folder: str, nodes: int = 2, cpus: int = 4) -> Iterator[dict[str, str]]:
    """Run munged, slurmctld and one slurmd per node; leaving the context ends them and their jobs.

    Args:
        folder: an empty folder for configuration, state and logs.
        nodes: number of nodes, named ``n1``, ``n2``, ... Partition ``high`` pre-empts ``low``, the
            default one.
        cpus: cores that each node reports.

    Yields:
        The environment variables with which commands reach this SLURM.

    Raises:
        UserError: a program is not installed, or SLURM does not start.
    """
    if missing := missing_commands():
        raise UserError(f"no {', '.join(missing)} here; on Debian: apt-get install slurm-wlm munge")
    root = Path(folder).resolve()
    os.makedirs(root / "state")
    os.chmod(root, 0o755)  # munged requires this of its socket's folder
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    port = _free_ports(nodes + 1)
    conf = root / "slurm.conf"
    conf.write_text(
        _CONF.format(
            host=socket.gethostname().partition(".")[0],
            port=port,
            first=port + 1,
            last=port + nodes,
            user=getpass.getuser(),
            folder=root,
            nodes=nodes,
            cpus=cpus,
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 // nodes,
        )
    )
    env = {"SLURM_CONF": str(conf), "PATH": _PATH}
    munged = ["munged", "--foreground", "--force", "--num-threads=2"]
    munged += [f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        [*munged, f"--socket={root}/munge.socket"],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", f"n{i + 1}"] for i in range(nodes)),
    ]
    started: list[subprocess.Popen] = []
    try:
        for command in commands:
            started.append(_start(command, root, env))
            if command is commands[0]:
                _wait_for(lambda: (root / "munge.socket").exists(), 10, started, root)
        _wait_for(lambda: _idle(env) == nodes, 60, started, root)
        yield env
    finally:
        _end_jobs(env)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive free ports, below those of outgoing connections."""
    for first in range(17001 + os.getpid() % 500 * 8, 32000, 8):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                return first
            except OSError:
                continue
    raise UserError("no free ports for a local SLURM")


def _start(command: list[str], root: Path, env: dict[str, str]) -> subprocess.Popen:
    with open(root / f"{command[0]}.out", "ab") as log:
        return subprocess.Popen(
            [shutil.which(command[0], path=_PATH), *command[1:]],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C must reach the command but not SLURM
            preexec_fn=following_parent(signal.SIGTERM),
        )


def _call(env: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _idle(env: dict[str, str]) -> int:
    states = _call(env, "sinfo", "--noheader", "--Node", "--partition=low", "--format=%t")
    return states.split().count("idle")


def _wait_for(
    condition: Callable[[], bool], seconds: float, started: list[subprocess.Popen], root: Path
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        dead = [p.args[0] for p in started if p.poll() is not None]
        if dead or time.monotonic() > deadline:
            logs = [f.read_text(errors="replace")[-500:] for f in root.glob("*.out")]
            raise UserError(
                f"the local SLURM does not start ({', '.join(dead) or 'no answer'}): "
                + " ".join(" ".join(logs).split())
            )
        time.sleep(0.1)


def _end_jobs(env: dict[str, str]) -> None:
    _call(env, "scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
    _call(env, "scancel", f"--user={getpass.getuser()}")
    deadline = time.monotonic() + 20
    while _call(env, "squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.2)


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (2)")
    parser.add_argument("--cpus", type=int, default=4, help="cores that each node reports (4)")
    parser.add_argument("command", nargs="+", help="what to run")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="local_slurm_") as folder,
        local_slurm(folder, args.nodes, args.cpus) as env,
    ):
        code = subprocess.call(args.command, env={**os.environ, **env})
    sys.exit(code)


if __name__ == "__main__":
    main()
