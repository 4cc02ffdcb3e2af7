"""Where jobs run and what each gets: this machine, or a SLURM cluster."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from region_pretrain.errors import UserError

KINDS = ("local", "slurm", "debug")
_INTEGERS = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task")
_INTEGERS += ("array_parallelism", "jobs", "signal_seconds")
_ALIASES = {
    "mem": "mem_gb",
    "ntasks_per_node": "tasks_per_node",
    "gpus": "gpus_per_node",
    "time_min": "time",
    "timeout_min": "time",
}
_NOT_IN_TEXT = ("kind", "extra", "setup")


@dataclass(frozen=True)
class Cluster:
    """What a job gets, as a site's users know it from ``sbatch``.

    Attributes:
        kind: ``slurm``, ``local`` (processes of this machine) or ``debug`` (one job after the
            other, in this shell).
        partition: SLURM's partition.
        account: who pays.
        qos: quality of service.
        constraint: features that the nodes must have.
        time: limit in minutes; None takes the partition's default. A run that needs longer goes on
            in the next attempt.
        mem_gb: memory of a node in GB.
        nodes: nodes of one job.
        gpus_per_node: GPUs of each node; as many tasks, one a GPU.
        tasks_per_node: processes of each node; None is one a GPU, or one.
        cpus_per_task: cores of each process.
        gres: other resources in SLURM's words.
        exclude: nodes to keep away from.
        extra: further ``sbatch`` parameters, name without dashes -> value.
        setup: shell lines that each job runs first, such as ``module load cuda``.
        container: a command that the tool's own command line is put behind, such as
            ``apptainer exec --nv image.sif``. What requeues the job stays outside.
        array_parallelism: jobs of one array that run at once.
        jobs: local: jobs that run at once.
        signal_seconds: the job is told so long before its time is up.
    """

    kind: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int | None = None
    mem_gb: float | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    gres: str | None = None
    exclude: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    setup: Sequence[str] = ()
    container: str = ""
    array_parallelism: int = 32
    jobs: int = 1
    signal_seconds: int = 120

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"cluster kind={self.kind}: must be one of {', '.join(KINDS)}")
        for name in _INTEGERS:
            value, least = getattr(self, name), 0 if name == "gpus_per_node" else 1
            if value is not None and value < least:
                raise UserError(f"cluster {name}={value}: must be at least {least}")
        self._check_tasks()
        if self.time is not None and self.time * 60 <= self.signal_seconds:
            raise UserError(
                f"cluster time={self.time} minutes, but jobs are told signal_seconds="
                f"{self.signal_seconds} before the end: lengthen the one or shorten the other"
            )

    def _check_tasks(self) -> None:
        gpus, tasks = self.gpus_per_node, self.tasks_per_node
        if gpus and self.gres and "gpu" in self.gres:
            raise UserError(
                f"cluster gres={self.gres} and gpus_per_node={gpus} both ask for GPUs: say it once"
            )
        if gpus and tasks and gpus != tasks:
            raise UserError(
                f"cluster gpus_per_node={gpus} and tasks_per_node={tasks}: "
                "each GPU gets one task; leave tasks_per_node out"
            )
        told = f"nodes={self.nodes}" if self.nodes > 1 else f"gres={self.gres}"
        if not gpus and not tasks and (self.nodes > 1 or "gpu" in (self.gres or "")):
            raise UserError(
                f"cluster {told} without tasks: say how many processes each node gets, with "
                "gpus-per-node=N (one a GPU) or tasks-per-node=N"
            )
        if self.kind != "slurm" and self.nodes > 1:
            raise UserError(f"cluster nodes={self.nodes}: kind={self.kind} has one machine")

    @property
    def tasks(self) -> int:
        """Processes of each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


def parse_slurm(text: str) -> Cluster:
    """The value of ``--slurm``.

    Args:
        text: ``key=value`` with commas between, keys as :class:`Cluster` or ``sbatch`` has them,
            ``+key=value`` for any other parameter of ``sbatch``. A value may hold commas itself
            (``exclude=n1,n2``). First of all may stand a cluster file:
            ``clusters/mine.py,nodes=2``.

    Raises:
        UserError: an unknown key (with the nearest known ones), a wrong value, settings that
            contradict each other.
    """
    items: list[str] = []
    for piece in re.split(r",(?![^\[]*\])", text):  # not within n[1,2]
        if "=" in piece or not items:
            items.append(piece.strip())
        else:
            items[-1] += f",{piece}"
    if items[0].endswith(".py"):
        return load_cluster(items[0], items[1:])
    return _changed(Cluster(), [item for item in items if item], "--slurm")


def load_cluster(path: str, overrides: Sequence[str] = ()) -> Cluster:
    """Read a site's settings.

    Args:
        path: a LazyConfig file with a dict ``cluster``, whose keys are :class:`Cluster`'s.
        overrides: ``key=value`` as in :func:`parse_slurm`.

    Raises:
        UserError: there is no such file, or its settings are no good.
    """
    from detectron2.config import LazyConfig  # a job that runs has no need of it
    from omegaconf import OmegaConf

    if not os.path.isfile(path):
        raise UserError(f"no cluster file {path}")
    try:
        config = LazyConfig.load(path)
    except Exception as error:
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if "cluster" not in config:
        raise UserError(f"{path} has no dict named cluster; see configs/clusters/example.py")
    settings = OmegaConf.to_container(OmegaConf.create(config["cluster"]), resolve=True)
    known = [f.name for f in dataclasses.fields(Cluster)]
    values = {}
    for key, value in settings.items():
        name = _field(key, known, path)
        values[name] = _value(name, str(value)) if isinstance(value, str) else value
    return _changed(_build(path, values), overrides, path)


def _changed(cluster: Cluster, items: Sequence[str], where: str) -> Cluster:
    values = {f.name: getattr(cluster, f.name) for f in dataclasses.fields(Cluster)}
    values["extra"] = dict(cluster.extra)
    known = [name for name in values if name not in _NOT_IN_TEXT]
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UserError(f"{where}: {item!r} is not of the form key=value")
        if key.startswith("+"):
            values["extra"][key[1:]] = value
        else:
            name = _field(key, known, where)
            values[name] = _value(name, value)
    return _build(where, values)


def _build(where: str, values: dict[str, Any]) -> Cluster:
    try:
        return Cluster(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _field(key: str, known: Sequence[str], where: str) -> str:
    name = key.strip().replace("-", "_")
    name = _ALIASES.get(name, name)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    shown = ", ".join(n.replace("_", "-") for n in near)
    kind = "did you mean" if near is not known else "known are"
    raise UserError(
        f"{where}: no setting {key!r}; {kind} {shown}? +{key}=... hands it to sbatch as it is"
    )


def _value(name: str, text: str) -> Any:
    try:
        if name == "time":
            return _minutes(text)
        if name == "mem_gb":
            number, unit = re.fullmatch(r"([\d.]+)\s*([MGT]?)B?", text, re.IGNORECASE).groups()
            return float(number) * {"M": 1 / 1024, "T": 1024}.get(unit.upper(), 1)
        return int(text) if name in _INTEGERS else text
    except (ValueError, AttributeError):
        wanted = {
            "time": "minutes, HH:MM:SS or D-HH:MM:SS",
            "mem_gb": "a number of GB, as 64 or 64G",
        }.get(name, "a whole number")
        raise UserError(f"cluster {name}={text}: must be {wanted}") from None


def _minutes(text: str) -> int:
    """SLURM's forms of a time: M, M:S, H:M:S, D-H, D-H:M and D-H:M:S; seconds count as a minute."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not 1 <= len(parts) <= 3:
        raise ValueError(text)
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def check_cluster(cluster: Cluster) -> None:
    """Ask SLURM whether it has what the settings name, before anything is submitted.

    Args:
        cluster: other kinds than ``slurm`` have nothing to ask.

    Raises:
        UserError: no ``sbatch`` here, the controller does not answer, no such partition, or SLURM
            would refuse the job.
    """
    if cluster.kind != "slurm":
        return
    for command in ("sbatch", "srun", "sinfo", "scontrol"):
        if shutil.which(command) is None:
            raise UserError(
                f"no {command} on this machine: --slurm is for a login node of a SLURM cluster; "
                "--dry-run shows what would be submitted"
            )
    lines = _ask("sinfo", "--noheader", "--format=%R").split()
    partitions = list(dict.fromkeys(lines))
    for name in (cluster.partition or "").split(","):
        if name and name not in partitions:
            near = difflib.get_close_matches(name, partitions, n=3) or partitions
            raise UserError(f"no partition {name!r} here: there is {', '.join(near)}")


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for 60 s: is slurmctld up?") from None
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
