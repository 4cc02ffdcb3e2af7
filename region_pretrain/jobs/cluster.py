"""Where jobs run, and the resources of each: on this machine, or on a SLURM cluster."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from region_pretrain.errors import UserError, did_you_mean
from region_pretrain.jobs import slurm

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
#: Settings of some of a sweep's jobs: dicts of the others.
_GROUPS = ("cpu", "finetune")
_NOT_IN_TEXT = ("kind", "extra", "setup", *_GROUPS)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Cluster:
    """The resources of a job, under the names that ``sbatch`` uses.

    Attributes:
        kind: ``slurm``, ``local`` (processes on this machine) or ``debug`` (one job at a time in
            this shell).
        partition: SLURM partition.
        account: account to charge.
        qos: quality of service.
        constraint: features that the nodes must have.
        time: limit in minutes; None for the partition's default. A longer run is requeued and
            resumes.
        mem_gb: memory per node in GB.
        nodes: nodes per job.
        gpus_per_node: GPUs per node, with one task per GPU.
        tasks_per_node: processes per node; None for one per GPU, or one without GPUs.
        cpus_per_task: cores per process.
        gres: other generic resources, in SLURM's syntax.
        exclude: nodes to avoid.
        extra: further ``sbatch`` options, name without dashes -> value.
        setup: shell lines that each job runs first, such as ``module load cuda``.
        container: prefix of the tool's command line, such as ``apptainer exec --nv image.sif``.
            The code that requeues a job runs outside of it.
        array_parallelism: jobs of one array that run at once.
        jobs: ``local`` only: jobs that run at once.
        signal_seconds: seconds of warning before the time limit.
        cpu: what differs for a sweep's jobs of one process without GPU, under the names above, such
            as ``{"partition": "cpu", "mem_gb": 16}``.
        finetune: what differs for a sweep's fine-tunings, such as ``{"nodes": 1, "gpus_per_node":
            1}``. Without ``mem_gb``, their memory per process is that of the others.
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
    cpu: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("extra", "setup", *_GROUPS):  # a set-up line is code in any case
                refuse_control_characters(f"cluster {name}", value)
        for key, value in self.extra.items():
            refuse_control_characters(f"sbatch option {key!r}", value)
            if not re.fullmatch(r"[\w-]+", str(key)):
                raise UserError(f"sbatch option {key!r}: use only letters, digits, - and _")
        if self.kind not in KINDS:
            raise UserError(f"cluster kind={self.kind}: must be one of {', '.join(KINDS)}")
        for name in _INTEGERS:
            value, least = getattr(self, name), 0 if name == "gpus_per_node" else 1
            if value is not None and value < least:
                raise UserError(f"cluster {name}={value}: must be at least {least}")
        self._check_tasks()
        for name in self.cpu:
            if name in ("kind", "nodes", "tasks_per_node", "gpus_per_node", "jobs", *_GROUPS):
                raise UserError(f"cluster cpu has {name}: its jobs are one process without GPU")
        for name in self.finetune:
            if name in ("kind", "jobs", *_GROUPS):
                raise UserError(f"cluster finetune has {name}: set it for all jobs")
        # These check their values.
        if self.cpu:
            self.for_one_process()
        if self.finetune:
            one, most = self.for_finetuning().tasks, self.jobs * self.tasks
            if self.kind == "local" and one > most:
                raise UserError(f"cluster finetune has {one} processes, all jobs together {most}")
        if self.time is not None and self.time * 60 <= self.signal_seconds:
            raise UserError(
                f"cluster time={self.time} minutes is not longer than signal_seconds="
                f"{self.signal_seconds}: raise time or lower signal_seconds"
            )

    def _check_tasks(self) -> None:
        gpus, tasks = self.gpus_per_node, self.tasks_per_node
        if gpus and self.gres and "gpu" in self.gres:
            raise UserError(
                f"cluster gres={self.gres} and gpus_per_node={gpus} both request GPUs: set only one"
            )
        if gpus and tasks and gpus != tasks:
            raise UserError(
                f"cluster gpus_per_node={gpus} and tasks_per_node={tasks}: "
                "there is one task per GPU; leave tasks_per_node out"
            )
        if not gpus and not tasks and (self.nodes > 1 or "gpu" in (self.gres or "")):
            setting = f"nodes={self.nodes}" if self.nodes > 1 else f"gres={self.gres}"
            raise UserError(
                f"cluster {setting} without tasks: set the number of processes per node with "
                "gpus-per-node=N (one per GPU) or tasks-per-node=N"
            )
        if self.kind != "slurm" and self.nodes > 1:
            raise UserError(f"cluster nodes={self.nodes}: kind={self.kind} has only one node")

    def for_one_process(self) -> Cluster:
        """The resources of a job that generates regions or chooses a learning rate: no GPU."""
        one = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": None, "gres": None}
        if self.mem_gb is not None:
            one["mem_gb"] = self.mem_gb / self.tasks
        return self._with({**one, **self.cpu})

    def for_finetuning(self) -> Cluster:
        """The resources of a sweep's fine-tuning; on this machine, as many run at once as fit."""
        if not self.finetune:
            return self
        one = self._with(self.finetune)
        changes: dict[str, Any] = {"jobs": max(1, self.jobs * self.tasks // one.tasks)}
        if self.mem_gb is not None and "mem_gb" not in self.finetune:
            changes["mem_gb"] = self.mem_gb * one.tasks / self.tasks
        return dataclasses.replace(one, **changes)

    def _with(self, changes: Mapping[str, Any]) -> Cluster:
        return dataclasses.replace(self, **{**changes, **dict.fromkeys(_GROUPS, {})})

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or self.gpus_per_node or 1


def refuse_control_characters(what: str, value: Any) -> None:
    """Refuse a line break and its like, with which a value would become a line of a batch script.

    Args:
        what: the value's name in the error message.
        value: its text is checked.

    Raises:
        UserError: it contains a control character.
    """
    if _CONTROL.search(str(value)):
        raise UserError(
            f"{what}={str(value)!r}: line breaks and control characters are not allowed"
        )


def parse_slurm(text: str) -> Cluster:
    """Parse the value of ``--slurm``.

    Args:
        text: comma-separated ``key=value`` with the keys of :class:`Cluster` or ``sbatch``, and
            ``+key=value``, or ``+key`` for a flag, for any other option of ``sbatch``. A value may
            contain commas (``exclude=n1,n2``). ``finetune.key=value`` is for a sweep's fine-tunings
            and ``cpu.key=value`` for its jobs without GPU. The first item may be a cluster file:
            ``clusters/mine.py,nodes=2``.

    Raises:
        UserError: an unknown key (the message suggests similar ones), an invalid value, a file for
            another kind of cluster, or contradictory settings.
    """
    items: list[str] = []
    for piece in re.split(r",(?![^\[]*\])", text):  # but not at the comma of n[1,2]
        if "=" in piece or piece.lstrip().startswith("+") or not items:
            items.append(piece.strip())
        else:
            items[-1] += f",{piece}"
    if items[0].endswith(".py"):
        cluster = load_cluster(items[0], items[1:])
        if cluster.kind != "slurm":
            raise UserError(f"--slurm {text}: the file has kind={cluster.kind}, not slurm")
        return cluster
    return _override(Cluster(), {}, items, "--slurm")


def load_cluster(path: str, overrides: Sequence[str] = ()) -> Cluster:
    """Load a site's settings.

    Args:
        path: a LazyConfig file with a dict ``cluster``, whose keys are :class:`Cluster`'s.
        overrides: ``key=value`` as in :func:`parse_slurm`.

    Raises:
        UserError: the file does not exist, or its settings are invalid.
    """
    from detectron2.config import LazyConfig  # slow, and not needed inside a job
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
    changes = _settings(settings, path)
    for group in _GROUPS:
        if not isinstance(changes.get(group, {}), dict):
            raise UserError(f"{path}: {group}={changes[group]!r} must be a dict of settings")
        if changes.get(group):
            changes[group] = _settings(changes[group], f"{path}: {group}")
    return _override(_replace(Cluster(), changes, path), settings, overrides, path)


def _settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = [f.name for f in dataclasses.fields(Cluster)]
    changes = {}
    for key, value in settings.items():
        name = _field(key, known, where)
        changes[name] = _value(name, value) if isinstance(value, str) else value
    return changes


def _override(
    cluster: Cluster, settings: Mapping[str, Any], items: Sequence[str], where: str
) -> Cluster:
    known = [f.name for f in dataclasses.fields(Cluster) if f.name not in _NOT_IN_TEXT]
    changes: dict[str, Any] = {"extra": dict(cluster.extra)}
    as_sbatch = "gpus" in settings
    for item in filter(None, items):
        key, equals, value = item.partition("=")
        if key.startswith("+") and (value or not equals):
            changes["extra"][key[1:]] = value or True  # submitit writes a flag
        elif not value:
            raise UserError(f"{where}: {item!r} is not of the form key=value")
        else:
            group, _, own = key.strip().partition(".")
            if own and group in _GROUPS:
                name = _field(own, known, f"{where}: {group}")
                changes.setdefault(group, dict(getattr(cluster, group)))
                changes[group][name] = _value(name, value)
                continue
            name = _field(key, known, where)
            changes[name] = _value(name, value)
            if name == "gpus_per_node":
                as_sbatch = key == "gpus"
    found = _replace(cluster, changes, where)
    if found.nodes > 1 and as_sbatch:
        raise UserError(
            f"{where}: gpus=N is the number of a node here, and of a job for sbatch: with "
            f"nodes={found.nodes} write gpus-per-node=N"
        )
    return found


def _replace(cluster: Cluster, changes: dict[str, Any], where: str) -> Cluster:
    try:
        return dataclasses.replace(cluster, **changes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _field(key: str, known: Sequence[str], where: str) -> str:
    name = key.strip().replace("-", "_")
    name = _ALIASES.get(name, name)
    if name in known:
        return name
    hint = did_you_mean(name, known, 3, 0.5, f"; known settings: {', '.join(known)}.")
    hint = hint.replace("_", "-")
    raise UserError(f"{where}: no setting {key!r}{hint} +{key}=... passes it to sbatch unchanged")


def _value(name: str, text: str) -> Any:
    try:
        if name == "time":
            return _minutes(text)
        if name == "mem_gb":
            number, unit = re.fullmatch(r"([\d.]+)\s*([MGT]?)B?", text, re.IGNORECASE).groups()
            return float(number) * {"M": 1 / 1024, "T": 1024}.get(unit.upper(), 1)
        return int(text) if name in _INTEGERS else text
    except (ValueError, AttributeError):
        expected = {
            "time": "minutes, HH:MM:SS or D-HH:MM:SS",
            "mem_gb": "a number of GB, such as 64 or 64G",
        }.get(name, "an integer")
        raise UserError(f"cluster {name}={text}: must be {expected}") from None


def _minutes(text: str) -> int:
    """Parse SLURM's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; seconds are rounded up to a minute."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not 1 <= len(parts) <= 3:
        raise ValueError(text)
    if dash:
        parts = [*parts, 0, 0]
    elif len(parts) < 3:
        parts = [0, *parts, 0]
    hours, minutes, seconds = parts[:3]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def check_cluster(cluster: Cluster) -> None:
    """Check that SLURM is here and has the partition, before anything is submitted.

    Args:
        cluster: the settings; kinds other than ``slurm`` need no check.

    Raises:
        UserError: a command is missing, SLURM does not answer, or a partition does not exist.
    """
    if cluster.kind != "slurm":
        return
    slurm.require_commands()
    partitions = slurm.list_partitions()
    wanted = [cluster.partition, *(getattr(cluster, g).get("partition") for g in _GROUPS)]
    for name in ",".join(filter(None, wanted)).split(","):
        if name and name not in partitions:
            near = difflib.get_close_matches(name, partitions, n=3) or partitions
            raise UserError(f"no partition {name!r} in this cluster; there is {', '.join(near)}")
