"""The graph of a sweep's runs, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

REGIONS, PRETRAIN, TRIAL, CHOICE, FINETUNE = "regions", "pretrain", "trial", "choice", "finetune"


@dataclass(frozen=True)
class Run:
    """A node of the graph: one command line, or the shards of one.

    Attributes:
        id: hash of what it computes: tool, settings, and its parents' ids.
        kind: ``regions``, ``pretrain``, ``trial`` (of a learning rate), ``choice`` (of the best
            one) or ``finetune``.
        name: for people, unique in a plan.
        tool: path in the checkout.
        tasks: arguments of each command line; several share the work of a region store.
        folder: the run's own.
        product: a file that appears when the run is finished, and not before.
        parents: ids of the runs that must be finished first.
    """

    id: str
    kind: str
    name: str
    tool: str
    tasks: tuple[tuple[str, ...], ...]
    folder: str
    product: str
    parents: tuple[str, ...] = ()


@dataclass
class Plan:
    """The graph, and what its runs are of the sweep.

    Attributes:
        runs: by id, parents first.
        entries: one for each thing that the sweep asks for, ``run`` being the id of the run that
            does it: ``kind``, ``init``, ``seed``, ``finetune``, ``label_fraction``,
            ``checkpoint``, ``learning_rate``. Two that ask for the same have the same run.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """What :meth:`to_json` gave."""
        runs = {}
        for name, run in values["runs"].items():
            tasks = tuple(tuple(task) for task in run["tasks"])
            runs[name] = Run(**{**run, "tasks": tasks, "parents": tuple(run["parents"])})
        return cls(runs, list(values["entries"]))
