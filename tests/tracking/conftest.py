"""Settings of the tracking services, and readers of what they leave on the disk."""

import os
import struct
import sys
from pathlib import Path

import pytest

from region_pretrain.engine import tracker

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))  # tiny_run


@pytest.fixture(autouse=True)
def _services_have_time(monkeypatch):
    """On a busy machine, theirs to end is longer than a run that is stopped should wait."""
    monkeypatch.setattr(tracker, "_STOPPED_SECONDS", 120.0)
    monkeypatch.setattr(tracker, "_GRACE", 120.0)


@pytest.fixture(autouse=True, scope="module")
def _no_service_is_reached(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("WANDB_", "MLFLOW_")):
                patch.delenv(name)
        _use_disk(patch, tmp_path_factory.mktemp("services"))
        yield


def _use_disk(monkeypatch, store):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(store / "wandb"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(store / "wandb"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(store / "wandb"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{store}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    # Children import what this process does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))


@pytest.fixture(scope="module")
def wandb_records():
    """Reads the records of each offline attempt in a run's folder, in the order of their starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    def read(folder):
        attempts = []
        paths = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
        for path in sorted(paths, key=lambda p: p.stat().st_mtime):
            attempts.append((path.stem, [Record.FromString(part) for part in chunks(path)]))
        return attempts

    return read


def chunks(path):
    """The records of a LevelDB log, whose header has 7 bytes, as have those of its parts."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):  # complete, or the last part
            yield parts
            parts = b""


@pytest.fixture(scope="module")
def mlflow_client():
    """A client of the store that the tests write to."""
    from mlflow import MlflowClient

    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
