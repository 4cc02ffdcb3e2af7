"""Shared fixtures."""

import functools
import gc
import json
import logging
import os
import random
import shutil
import signal
import sys

# Many small processes share few cores, so waiting threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.utils.cpp_extension  # as each run does: forked processes have it already
from detectron2.utils.logger import _LOG_COUNTER
from hypothesis import HealthCheck, settings

from region_pretrain.data.catalog import get_records
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.photometry import Photometry
from region_pretrain.engine import run as engine_run
from region_pretrain.projects.soco import SoCoViews
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import make_regions

sys.path.insert(0, str(Path(__file__).parent))
from forked import fork_processes  # noqa: E402  found by the line above

# Processes of the tests start at once: each would import PyTorch for seconds otherwise.
fork_processes()

# Shells ignore Ctrl-C in what they start in the background, and so would the tests' processes.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A forked process does not have OpenCV's threads, and would wait for them.
cv2.setNumThreads(0)

# Autograd starts a thread per device in its first backward pass, and then no process can fork. The
# number of devices is that of now: later, a fake tensor is enough to add one.
if not torch.cuda.device_count():
    torch.ones(1, requires_grad=True).sum().backward()


@functools.cache
def _git_state_in(folder: str, found=engine_run.git_state):
    return found()


# What each run logs at its start, and what does not change during the tests: programs tell it.
engine_run.collect_env_info = functools.cache(engine_run.collect_env_info)
engine_run.git_state = lambda: _git_state_in(os.getcwd())
engine_run.collect_env_info(), engine_run.git_state()  # before the first fork

# The same examples in every CI run, new ones in every local run; both also on a busy machine.
busy = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, **busy)
settings.register_profile("local", **busy)
settings.load_profile("ci" if os.environ.get("CI") else "local")

#: Their tests are few and take minutes: they start first, so that no worker is left with them.
LONGEST = [
    "device/test_two_processes.py",
    "sweeps/test_benchmark.py",
    "device/test_one_process.py",
    "sweeps/test_demo.py",
    "faults/test_kill.py",
    "test_packaging.py",
    "test_other_machines.py",
    "faults/test_long_run.py",
    "benchmark/test_loader.py",
    "engine/test_own_data.py",
    "engine/test_refresh.py",
    "reporting/test_training_pictures.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported: each fork collects garbage before


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _as_if_alone():
    """Other tests of this process drew random numbers, logged, and their runs took the loggers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for name in ("fvcore", "detectron2", "region_pretrain"):
        log = logging.getLogger(name)
        log.propagate = True
        log.handlers.clear()
    _LOG_COUNTER.clear()  # of what is logged once in a process


@dataclass
class RegionFolder:
    """A folder of images, their region store, and the boxes by key."""

    images: Path
    store: str
    boxes: dict[str, np.ndarray]


def _paint(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = np.full((64, 64, 3), 120, np.uint8)
    for _ in range(6):
        x, y = rng.integers(0, 44, 2).tolist()
        colour = rng.integers(0, 256, 3).tolist()
        cv2.rectangle(image, (x, y), (x + 24, y + 20), colour, -1)
    cv2.imwrite(str(path), image)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_session(tmp_path_factory):
    """Fixed copies of jsons do not go to the user's cache, also from the processes of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def processes_of_the_test(request, monkeypatch):
    if "spawns" in request.keywords:
        fork_processes(monkeypatch.setattr, fork=False)


@pytest.fixture
def coco_folder(tmp_path) -> Path:
    """A folder with ``images/`` and ``ann.json``: 6 images, 12 boxes of 3 classes.

    The ids are neither sorted nor contiguous; the classes by id are dog, ant, cat.
    """
    root = tmp_path / "coco"
    (root / "images").mkdir(parents=True)
    rng, images, boxes = np.random.default_rng(0), [], []
    for i, image_id in enumerate([30, 9, 8, 581, 2, 77]):
        _paint(root / "images" / f"{image_id}.png", i)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 64, "height": 64})
        for _ in range(2):
            (x, y), (w, h) = rng.integers(0, 30, 2).tolist(), rng.integers(12, 34, 2).tolist()
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": image_id,
                    "category_id": [7, 3, 12][len(boxes) % 3],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [{"id": 12, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 7, "name": "ant"}]
    data = {"info": {}, "images": images, "annotations": boxes, "categories": categories}
    (root / "ann.json").write_text(json.dumps(data))
    return root


@pytest.fixture(scope="session")
def painted(tmp_path_factory) -> Path:
    """What :func:`region_folder` copies: the search for regions takes longer than most tests."""
    folder = tmp_path_factory.mktemp("painted")
    (folder / "images/sub").mkdir(parents=True)
    for i in range(12):
        _paint(folder / "images" / ("sub" if i % 2 else "") / f"{i:02d}.png", i)
    records = get_records(f"folder://{folder / 'images'}")
    make_regions(records, str(folder / "regions.arrow"), "shapes-v1", workers=1)
    return folder


@pytest.fixture
def region_folder(painted, tmp_path) -> RegionFolder:
    """Twelve images of 64 pixels in nested folders, with regions of the recipe ``shapes-v1``."""
    shutil.copytree(painted, tmp_path, dirs_exist_ok=True)
    root, path = tmp_path / "images", str(tmp_path / "regions.arrow")
    keys = [str(r["image_id"]) for r in get_records(f"folder://{root}")]
    store = RegionStore.open(path)
    return RegionFolder(root, path, {key: store.boxes(key) for key in keys})


@pytest.fixture
def soco_views() -> SoCoViews:
    """Two views of 32 pixels and one of 16, with every photometric operation."""
    photometry = Photometry(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.5, (0.1, 1.0), 0.2)
    return SoCoViews([32, 32, 16], ["crop", "crop"], photometry, photometry)


@pytest.fixture
def pretrain_dataset(region_folder, soco_views) -> PretrainDataset:
    """The folder of :func:`region_folder` through SoCo's views."""
    return PretrainDataset(f"folder://{region_folder.images}", soco_views, region_folder.store)
