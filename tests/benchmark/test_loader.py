"""The loader's throughput and memory."""

import os
import time

import cv2
import numpy as np
import pytest

from region_pretrain.benchmark.images import make_jpegs
from region_pretrain.benchmark.loader import benchmark_loader
from region_pretrain.benchmark.measure import loader_rates, use_images
from region_pretrain.benchmark.timing import interleaved
from region_pretrain.config import load_config
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.loader import PretrainLoader
from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore
from region_pretrain.shipped import ROOT


def test_synthetic_files_have_the_documented_size_and_are_repeatable(tmp_path):
    name, store_path = make_jpegs(str(tmp_path / "a"), 3)
    store = RegionStore.open(store_path)
    files = sorted((tmp_path / "a" / "images").iterdir())
    assert name == f"folder://{tmp_path}/a/images" and len(files) == 3
    for file in files:
        assert cv2.imread(str(file)).shape == (375, 500, 3)
        assert file.stat().st_size == pytest.approx(80_000, rel=0.1)
        assert store.size(file.name) == (500, 375) and len(store.boxes(file.name)) == 100
    make_jpegs(str(tmp_path / "b"), 1)
    assert files[0].read_bytes() == (tmp_path / "b" / "images" / "00000.jpg").read_bytes()
    with pytest.raises(UserError, match="--synthetic-images 0: must be at least 1"):
        make_jpegs(str(tmp_path / "c"), 0)
    with pytest.raises(
        UserError, match="--synthetic-size 500x63: sides must be at least 64 pixels"
    ):
        make_jpegs(str(tmp_path / "c"), 1, (500, 63))


def test_synthetic_files_of_another_size(tmp_path):
    make_jpegs(str(tmp_path), 1, (200, 320))
    path = tmp_path / "images" / "00000.jpg"
    assert cv2.imread(str(path)).shape == (320, 200, 3)
    assert path.stat().st_size == pytest.approx(80_000 * (200 * 320) / (500 * 375), rel=0.1)
    boxes = RegionStore.open(str(tmp_path / "regions.arrow")).boxes("00000.jpg")
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (200, 320)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_kinds_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    now, calls = [0.0], []
    costs = {"a": iter([100, 1, 2, 9, 2]), "b": iter([100, 5, 5, 5, 5])}
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def kind(name):
        def call():
            calls.append(name)
            now[0] += next(costs[name])

        return call

    found = interleaved({"a": kind("a"), "b": kind("b")}, seconds=10)
    assert found == {"a": 2, "b": 5}
    assert calls == ["a", "b"] * 4  # a warm-up round, and at least three rounds


def test_a_recipe_that_reads_labels_is_measured_without_them(tmp_path):
    path = str(ROOT / "projects/MCL/configs/mcl-supervised_r50-fpn_32xb128-100ep_imagenet.py")
    cfg = load_config(path, ["dataloader.train.total_batch_size=2"])
    use_images(cfg, *make_jpegs(str(tmp_path), 2))
    assert cfg.dataloader.train.dataset.labels
    assert loader_rates(cfg, seconds=0.01).size[:2] == (500, 375)


@pytest.fixture
def processor_time(monkeypatch):
    """Clocks that stop while other processes and threads have the core."""
    monkeypatch.setattr("time.perf_counter", time.thread_time)


def test_rates_and_parts_of_the_loader(tmp_path, soco_views, processor_time):
    name, store = make_jpegs(str(tmp_path), 2)
    dataset = PretrainDataset(name, soco_views, store, antialias=False)
    rates = benchmark_loader(dataset, 2, seconds=0.2)
    assert rates.size[:2] == (500, 375)
    # The loader does more than decoding.
    assert 0 < rates.antialiased < rates.decode and 0 < rates.linear < rates.decode
    assert sum(rates.parts.values()) == pytest.approx(1)
    # Small files are decoded at full size.
    assert rates.parts["decode"] == pytest.approx(rates.antialiased / rates.decode, rel=0.3)
    assert dataset.antialias is False


def test_large_files_are_decoded_at_a_reduced_size(tmp_path, soco_views, processor_time):
    name, store = make_jpegs(str(tmp_path), 1, (3200, 2400))
    dataset = PretrainDataset(name, soco_views, store)
    (drawn,) = dataset.draw(0, 0, [0])
    assert drawn.reduce == 8 and drawn.file.encoded.decode(drawn.reduce).shape == (300, 400, 3)
    rates = benchmark_loader(dataset, 1, seconds=0.2)
    as_drawn = rates.antialiased / rates.parts["decode"]  # images per second of this part
    assert as_drawn > 1.1 * rates.decode


def resident(*pids: int) -> float:
    pages = 0
    for pid in pids:
        with open(f"/proc/{pid}/statm") as file:
            fields = file.read().split()
        pages += int(fields[1]) - int(fields[2])  # without pages shared with files
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_flat_over_two_thousand_iterations(pretrain_dataset, workers):
    loader = PretrainLoader(pretrain_dataset, total_batch_size=2, num_workers=workers)
    batches = loader.iterate(0, 2100)
    sizes = []
    for i, batch in enumerate(batches):
        if i in (99, 2099 - 50):
            pids = [w.pid for w in batches._workers] if workers else []
            sizes.append(resident(os.getpid(), *pids))
        assert len(batch) == 2
    assert np.diff(sizes)[0] < 6, sizes  # MiB
