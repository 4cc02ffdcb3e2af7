"""The graph of a sweep's runs, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REGIONS, PRETRAIN, TRIAL, CHOICE, FINETUNE = "regions", "pretrain", "trial", "choice", "finetune"
CONFIG = "--config-file"  # precedes a config among the arguments of a command line


@dataclass(frozen=True)
class Run:
    """A node of the graph: one command line, or several that share the work of a region store.

    Attributes:
        id: hash of everything that determines the result: tool, settings and the parents' ids.
        kind: ``regions``, ``pretrain``, ``trial`` (of a learning rate), ``choice`` (of the best
            learning rate) or ``finetune``.
        name: readable name, unique in a plan.
        tool: path of the tool in the checkout.
        tasks: arguments of each command line.
        folder: the run's output folder.
        product: a file that exists once the run is finished, and not before.
        parents: ids of the runs that must finish first.
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
    """The graph of runs, and the role of each run in the sweep.

    Attributes:
        runs: run id -> run, parents first.
        entries: one dict per thing that the sweep asks for. Two entries that ask for the same
            computation name the same run. Keys:

            - ``kind``: as :attr:`Run.kind`
            - ``run``: id of the run
            - ``init``: the initialisation: a key of ``sweep.pretrain`` or ``sweep.baselines``
            - ``seed``: of training; not for ``regions`` and ``choice``
            - ``pretrain_seed``: seed of the pre-training that a ``trial`` or ``finetune`` starts
              from; absent without one
            - ``finetune``: key of ``sweep.finetune``; this and the following only for ``trial``,
              ``choice`` and ``finetune``
            - ``label_fraction``: in (0, 1]
            - ``checkpoint``: ``"final"``, or the pre-training iteration to fine-tune from
            - ``learning_rate``, ``metric``: only for ``trial``
    """

    runs: dict[str, Run] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)


def config_of(task: Sequence[str]) -> tuple[str, list[str]]:
    """The config of a command line, and what follows without the file of a chosen learning rate."""
    config, *others = task[task.index(CONFIG) + 1 :]
    return config, [word for word in others if not word.startswith("@")]
