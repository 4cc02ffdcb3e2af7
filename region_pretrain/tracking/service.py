"""The interface of a tracking service, and what it is given of a run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic

#: Short name of each service, which is also that of its package and of our pip extra -> its title.
SERVICES = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
#: Project (MLflow: experiment) of runs without one.
PROJECT = "region_pretrain"

Row = dict[str, float]


@dataclass(frozen=True)
class TrackedRun:
    """A run as its service knows it.

    Attributes:
        id: a resumed run keeps it.
        url: its page; None if it has none, e.g. offline.
    """

    id: str
    url: str | None = None


@dataclass(frozen=True)
class RunInfo:
    """What a service is given of a run.

    Attributes:
        output_dir: the run's folder.
        project: project or experiment; None: that of the service's environment variable.
        name: name of the run in it.
        group: name of a group of runs.
        tags: labels of the run.
        config: the complete config, nested.
        config_text: the config as YAML.
        git: result of :func:`~region_pretrain.tracking.git.git_state`.
        upload_model: upload ``model_final.pth``.
        history: iteration -> row of all earlier attempts, up to the resumed checkpoint.
        logged: newest iteration that earlier attempts have logged, also after that checkpoint; -1
            if there was none.
        seconds: time for the remaining uploads after the last iteration.
        pid: the training process, whose memory and CPU time the service may show.
    """

    output_dir: str
    project: str | None = None
    name: str = ""
    group: str | None = None
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    git: dict[str, dict[str, Any]] = field(default_factory=dict)
    upload_model: bool = False
    history: dict[int, Row] = field(default_factory=dict)
    logged: int = -1
    seconds: float = 60.0
    pid: int = 0


@dataclass(frozen=True)
class Rows:
    """New metrics and pictures.

    Attributes:
        time: Unix time of the rows.
        rows: iteration -> metrics.
        pictures: (iteration, name, PNG).
    """

    time: float
    rows: dict[int, Row]
    pictures: tuple[tuple[int, str, bytes], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been written."""

    path: str


@dataclass(frozen=True)
class End:
    """The end of the process, of a finished run or of an interrupted one."""

    finished: bool


class Service(ABC):
    """A connection to a service for one run. Any method but the constructor may be retried.

    Args:
        info: the run.
        report: called with a level of ``logging`` in lower case, and a message to the user.

    Raises:
        UserError: the service's settings are unusable, which shows without a connection.
        ImportError: its package does not work.
    """

    name: str

    def __init__(self, info: RunInfo, report: Callable[[str, str], None]) -> None:
        self.info = info
        self.report = report

    def tracked(self) -> TrackedRun | None:
        """The run that an earlier attempt has created."""
        return read_tracked(self.info.output_dir).get(self.name)

    def remember(self, tracked: TrackedRun) -> None:
        """Keep the run's id for its resumption."""
        path = _path(self.info.output_dir, self.name)
        try:
            write_text_atomic(path, json.dumps(asdict(tracked)) + "\n")
        except OSError as error:
            self.report("warning", f"{path} cannot be written: {error}")

    @abstractmethod
    def open(self, last_try: bool) -> int:
        """Create the run at the service, or continue it.

        Args:
            last_try: the training has ended, and the service may have to be reached later.

        Returns:
            The newest iteration that the service has; -1 if there is none.
        """

    @abstractmethod
    def log(self, iteration: int, row: Row, time: float) -> None:
        """Log metrics; iterations ascend."""

    @abstractmethod
    def log_picture(self, iteration: int, name: str, png: bytes) -> None:
        """Log a picture."""

    @abstractmethod
    def log_checkpoint(self, path: str, sha256: str) -> None:
        """Record a checkpoint."""

    @abstractmethod
    def upload(self, path: str) -> None:
        """Upload a checkpoint."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Send what is left; the run is finished or will be resumed."""


def check_package(name: str) -> None:
    """Check that a service's package is installed.

    Raises:
        UserError: it is not.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder that the service left here, not its package
        raise UserError(
            f"train.writers contains {name}, which is not installed: "
            f"pip install 'region_pretrain[{name}]'"
        )


def new_id() -> str:
    """A random id of a run."""
    return secrets.token_hex(8)


def _path(folder: str, service: str) -> str:
    return os.path.join(folder, f"{service}_run.json")


def read_tracked(folder: str) -> dict[str, TrackedRun]:
    """The run in an output folder as the services know it, by their short names."""
    found = {}
    for service in SERVICES:
        try:
            with open(_path(folder, service), encoding="utf-8") as file:
                tracked = TrackedRun(**json.load(file))
        except (OSError, TypeError, ValueError, RecursionError):
            continue
        if isinstance(tracked.id, str) and isinstance(tracked.url, str | None):
            found[service] = tracked
    return found


def forget_tracked(folder: str) -> None:
    """Remove the ids that an earlier run has left in a folder."""
    for service in SERVICES:
        with contextlib.suppress(FileNotFoundError):
            os.remove(_path(folder, service))
