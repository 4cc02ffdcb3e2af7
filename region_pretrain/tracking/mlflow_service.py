"""MLflow. Its settings are those of its environment variables (``MLFLOW_*``)."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from region_pretrain.errors import UserError, describe
from region_pretrain.tracking.service import PROJECT, Row, RunInfo, Service, TrackedRun

# Outages are retried by the caller, so that the time at the end of a run suffices for the rest.
_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_PER_REQUEST = 100  # parameters; 1000 metrics are allowed
_LONGEST = 500  # characters of a parameter


class MlflowService(Service):
    """A run of MLflow in an experiment called after the project."""

    name = "mlflow"

    def __init__(self, info: RunInfo, report: Callable[[str, str], None]) -> None:
        super().__init__(info, report)
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        import mlflow
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._error = MlflowException
        self._run_id = ""
        uri = mlflow.get_tracking_uri()
        try:
            self._client = MlflowClient(uri)
            if not uri.startswith("http"):
                self._client.get_experiment_by_name(PROJECT)
        except Exception as error:
            raise UserError(
                f"MLflow cannot use {uri}: {str(error).split('. ')[0]}. Set MLFLOW_TRACKING_URI to "
                "the address of a server; a database needs the package mlflow instead of "
                "mlflow-skinny"
            ) from error

    def open(self, last_try: bool) -> int:
        tracked = self.tracked()
        run = tracked and self._existing(tracked.id)
        if run is None:
            experiment = self._experiment()
            tags = dict(_tags(self.info))
            run = self._client.create_run(experiment, run_name=self.info.name, tags=tags)
            tracked = TrackedRun(run.info.run_id, self._url(experiment, run.info.run_id))
            self.remember(tracked)
        else:
            self._client.update_run(tracked.id, status="RUNNING")
        self._run_id = tracked.id
        self.report("info", f"MLflow: {tracked.url or f'run {tracked.id}'}")
        self._log_config(run.data.params)
        try:
            self._client.log_text(self._run_id, self.info.config_text, "config.yaml")
        except Exception as error:  # a server need not have a place for files
            self.report("warning", f"MLflow did not accept config.yaml: {describe(error)[:300]}")
        histories = (self._client.get_metric_history(tracked.id, m) for m in run.data.metrics)
        return max((metric.step for history in histories for metric in history), default=-1)

    def _experiment(self) -> str:
        name = self.info.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except self._error:  # another run has just created it
                found = self._client.get_experiment_by_name(name)
        return found.experiment_id

    def _existing(self, run_id: str) -> Any:
        """A run of the service; None if it has been deleted."""
        try:
            run = self._client.get_run(run_id)
            return None if run.info.lifecycle_stage == "deleted" else run
        except self._error as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _url(self, experiment: str, run_id: str) -> str | None:
        parts = urlsplit(self._client.tracking_uri)
        if parts.scheme not in ("http", "https"):
            return None
        path = f"{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        return f"{parts.scheme}://{path}/#/experiments/{experiment}/runs/{run_id}"

    def _log_config(self, known: Mapping[str, str]) -> None:
        """Send what an earlier attempt has not, which an outage may have ended between requests."""
        from mlflow.entities import Param

        named = {_name(key): value[:_LONGEST] for key, value in _leaves(self.info.config)}
        leaves = [Param(name, value) for name, value in named.items() if name not in known]
        for start in range(0, len(leaves), _PER_REQUEST):
            self._client.log_batch(self._run_id, params=leaves[start : start + _PER_REQUEST])

    def log(self, iteration: int, row: Row, time: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(_name(k), v, int(1000 * time), iteration) for k, v in row.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def log_picture(self, iteration: int, name: str, png: bytes) -> None:
        picture = Image.open(io.BytesIO(png))
        key = re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)
        self._client.log_image(self._run_id, picture, key=key, step=iteration, synchronous=True)

    def log_checkpoint(self, path: str, sha256: str) -> None:
        key = f"checkpoints/{os.path.basename(path)}"
        self._client.set_tag(self._run_id, key, f"{path} sha256:{sha256}")

    def upload(self, path: str) -> None:
        self._client.log_artifact(self._run_id, path, "checkpoints")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


def _name(text: str) -> str:
    """A metric's or parameter's name with the characters that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", text)


def _tags(info: RunInfo) -> Iterator[tuple[str, str]]:
    yield from ((_name(tag), "") for tag in info.tags)
    if info.group:
        yield "group", info.group
    yield "output_dir", info.output_dir
    for place, state in info.git.items():
        yield from ((f"git.{place}.{key}", str(value)) for key, value in state.items())
    if "region_pretrain" in info.git:  # shown by MLflow as the run's version
        yield "mlflow.source.git.commit", info.git["region_pretrain"]["commit"]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(node)
