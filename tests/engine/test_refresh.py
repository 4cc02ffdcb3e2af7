"""Regions computed with the momentum network, from a checkpoint and during a run."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from equality import equal
from refresh_runs import config, refresh_in_process, train_in_process
from tiny_run import CLOCK, final_checkpoint

from region_pretrain.data.catalog import get_records
from region_pretrain.data.loader import PretrainLoader
from region_pretrain.engine import refresh
from region_pretrain.engine.build import build_model
from region_pretrain.engine.feature_regions import FeatureBoxes, load_trained, resize_to_area
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import launch
from region_pretrain.engine.refresh import RefreshedLoader
from region_pretrain.errors import UserError
from region_pretrain.images import read_record
from region_pretrain.regions import RegionStore
from region_pretrain.regions.cluster_boxes import cluster_boxes
from region_pretrain.regions.elsewhere import FeaturesRecipe
from region_pretrain.regions.elsewhere.matching import GIVEN
from region_pretrain.regions.generate import make_regions


class Killed(BaseException):
    """Ends a run at an instant, like SIGKILL."""


def kill(*args, **kwargs):
    raise Killed


@contextmanager
def killed(monkeypatch, owner, name, call=1):
    """End the run within the context when a function is called for the ``call``-th time."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        return kill() if len(calls) == call else function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, counted)
        yield


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


def rows(path):
    store = RegionStore.open(str(path))
    return store.manifest["sha256"], store.manifest["recipe"]


@pytest.fixture
def run(region_folder, tmp_path):
    def run(name, *overrides, resume=False):
        folder = tmp_path / name
        do_pretrain(config(folder, region_folder.images, region_folder.store, *overrides), resume)
        return folder

    return run


@pytest.fixture
def whole(run, monkeypatch):
    """The folder of an undisturbed run, and its batches."""
    batches, iterate = [], RefreshedLoader.iterate

    def recorded(self, start, stop):
        for batch in iterate(self, start, stop):
            batches.append(batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(RefreshedLoader, "iterate", recorded)
        return run("whole"), batches


def test_a_run_killed_at_each_boundary_follows_the_undisturbed_one(whole, run, monkeypatch):
    folder, batches = whole
    steps = torch.optim.Optimizer
    resume = False
    for owner, name, call in (
        (RefreshedLoader, "_refresh", 1),  # before the first refresh
        (FeatureBoxes, "result", 6),  # in it: two of six parts are complete
        (FeatureBoxes, "result", 8),  # all parts are complete
        (steps, "zero_grad", 1),  # after it, before a checkpoint
        (steps, "zero_grad", 2),  # in the segment
        (RefreshedLoader, "_refresh", 1),  # before the second refresh
        (FeatureBoxes, "result", 5),
        (steps, "zero_grad", 2),
    ):
        with killed(monkeypatch, owner, name, call):
            run("killed", resume=resume)
        resume = True
    other = run("killed", resume=True)
    assert [line["iteration"] for line in lines(folder)] == list(range(8))
    assert lines(other) == lines(folder)
    for name in ("regions_epoch001.arrow", "regions_epoch002.arrow"):
        assert rows(other / name) == rows(folder / name)
        assert not (other / f"{name}.parts").exists()
    files = [final_checkpoint(f) for f in (folder, other)]
    assert equal(*files)
    assert files[0]["data"]["regions"] == rows(folder / "regions_epoch002.arrow")[0]
    before = torch.load(folder / "model_0000005.pth", weights_only=True)["data"]["regions"]
    assert before == rows(folder / "regions_epoch001.arrow")[0]


def test_each_segment_uses_its_own_regions(whole, run, region_folder):
    folder, batches = whole
    paths = [region_folder.store, *(f"{folder}/regions_epoch00{i}.arrow" for i in (1, 2))]
    assert len({rows(path)[0] for path in paths}) == 3
    for segment, path in enumerate(paths):
        cfg = config(folder, region_folder.images, path, "dataloader.train.dataset.recipe=null")
        start = 3 * segment
        for t, batch in enumerate(instantiate(cfg.dataloader.train).iterate(start, start + 2)):
            views = zip(batch.views, batches[start + t].views, strict=True)
            assert all(torch.equal(a.boxes, b.boxes) for a, b in views)
            assert torch.equal(batch.indices, batches[start + t].indices)
    cfg = config(folder, region_folder.images, region_folder.store)
    (old,) = instantiate(cfg.dataloader.train).iterate(3, 4)
    assert not torch.equal(old.views[0].boxes, batches[3].views[0].boxes)


def test_the_regions_of_a_run_are_those_of_its_checkpoint(whole, region_folder, tmp_path):
    folder, _ = whole
    model = load_trained(str(folder / "config.yaml"), str(folder / "model_0000002.pth"))
    boxes = FeatureBoxes(model, FeaturesRecipe("features-v1"), batch_size=2)
    records = get_records(f"folder://{region_folder.images}")
    out = str(tmp_path / "offline.arrow")
    summary = make_regions(records, out, boxes.recipe, workers=1, part_size=2, prepare=boxes)
    assert rows(out) == rows(folder / "regions_epoch001.arrow")
    assert summary["images"] == 12 and summary["boxes"] > 24


def test_boxes_are_those_of_the_target_networks_map(region_folder, tmp_path):
    cfg = config(tmp_path, region_folder.images, region_folder.store)
    model = build_model(cfg, torch.device("cpu")).eval()
    records = get_records(f"folder://{region_folder.images}")[:3]
    pixels = [torch.from_numpy(read_record(record)).permute(2, 0, 1).float() for record in records]
    mean, std = model.preprocess.pixel_mean, model.preprocess.pixel_std
    found = {}
    for flip, stride, name in (
        (False, 8, "p3"),
        (True, 8, "p3"),
        (False, 4, "p2"),
        (False, 2, "p2"),
    ):
        model.preprocess.flip_channels = flip
        images = torch.stack([x.flip(0) if flip else x for x in pixels])
        with torch.no_grad():
            maps = model.target["backbone"]((images - mean) / std)
            model.backbone.bottom_up.stem.conv1.weight.zero_()  # the online network
        expected = cluster_boxes(maps[name], (2, 5), (64, 64))
        recipe = FeaturesRecipe("features-v1", clusters=(2, 5), stride=stride)
        boxes = FeatureBoxes(model, recipe, batch_size=4)
        for record, own in zip(boxes(records), expected, strict=True):
            np.testing.assert_array_equal(record[GIVEN].boxes, own)
        found[flip, stride] = boxes.recipe.source
    assert len(set(found.values())) == 2  # of the input format; the stride is a field of its own


def test_two_processes_compute_the_store_of_one(region_folder, tmp_path):
    arguments = str(region_folder.images), region_folder.store
    refresh_in_process(str(tmp_path / "one"), *arguments)
    launch(refresh_in_process, 2, device="cpu", args=(str(tmp_path / "two"), *arguments))
    one, two = (rows(tmp_path / name / "regions_epoch001.arrow") for name in ("one", "two"))
    assert one == two


def test_a_store_that_nfs_shows_late_is_awaited(region_folder, tmp_path, monkeypatch):
    late = str(tmp_path / "late.arrow")
    monkeypatch.setattr(refresh.time, "sleep", lambda s: shutil.copy(region_folder.store, late))
    assert refresh._open_soon(late).manifest == RegionStore.open(region_folder.store).manifest
    monkeypatch.setattr(refresh, "NFS_SECONDS", -1)
    with pytest.raises(UserError, match="never.arrow has been written, but .* does not see it"):
        refresh._open_soon(str(tmp_path / "never.arrow"))


def test_two_killed_processes_follow_the_undisturbed_ones(region_folder, tmp_path, monkeypatch):
    def run(name, resume, kill_at=-1):
        monkeypatch.setenv("KILL_AT", str(kill_at))
        arguments = str(tmp_path / name), str(region_folder.images), region_folder.store, resume
        launch(train_in_process, 2, device="cpu", args=arguments)
        return tmp_path / name

    whole = run("whole", False)
    with pytest.raises(SystemExit):
        run("killed", False, kill_at=3)  # the newest checkpoint is the one before the refresh
    assert (tmp_path / "killed/last_checkpoint").read_text() == "model_0000002.pth"
    other = run("killed", True)
    assert [line["iteration"] for line in lines(other)] == list(range(5))
    assert lines(other) == lines(whole)
    files = [final_checkpoint(folder) for folder in (whole, other)]
    assert len(files[0]["rng"]) == 2 and equal(*files)
    assert files[0]["data"]["regions"] == rows(whole / "regions_epoch001.arrow")[0]


def test_regions_of_other_weights_are_replaced(run, region_folder, monkeypatch):
    with killed(monkeypatch, RefreshedLoader, "_refresh"):
        run("stale")
    folder = region_folder.images.parent / "stale"
    path = folder / "regions_epoch001.arrow"
    shutil.copy(region_folder.store, path)
    (folder / f"{path.name}.parts").mkdir()
    (folder / f"{path.name}.parts" / "plan.json").write_text('{"recipe": "other"}')
    with killed(monkeypatch, torch.optim.Optimizer, "zero_grad"):
        run("stale", resume=True)
    assert rows(path)[1].startswith("features-v1+source=")
    log = (folder / "log.txt").read_text()
    assert f"{path} has regions of other weights: replacing it" in log


def test_refusals(whole, run, region_folder, tmp_path):
    folder, _ = whole
    for name in ("model_final.pth", "model_0000005.pth"):
        (folder / name).unlink()
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(UserError, match="train.refresh_regions.epochs: 1 -> 2"):
        run("whole", "train.refresh_regions.epochs=2", resume=True)
    (folder / "regions_epoch001.arrow").unlink()
    with pytest.raises(UserError, match=r"epoch001.arrow is missing.*after model_0000002.pth"):
        run("whole", resume=True)
    for overrides, message in (
        (["train.refresh_regions.epochs=0.5"], "epochs=0.5: must be a whole number"),
        (["train.refresh_regions.batch_size=0"], "batch_size=0: must be at least 1"),
        (["train.refresh_regions.recipe=soco-v1"], "recipe=soco-v1: must be features-v1"),
        (['train.refresh_regions.recipe="features-v1+k=3"'], "has no field 'k'"),
        (["dataloader.train.dataset.regions=null"], "the data has no regions to replace"),
    ):
        with pytest.raises(UserError, match=message):
            run(f"bad-{len(message)}", *overrides)


def test_a_model_without_a_backbone_is_refused_before_the_first_step(region_folder, tmp_path):
    cfg = config(tmp_path, region_folder.images, region_folder.store)
    loader = instantiate(cfg.dataloader.train)
    refreshed = RefreshedLoader(loader, cfg.train.refresh_regions, str(tmp_path))
    with pytest.raises(UserError, match="Linear has no backbone"):
        refreshed.attach(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("method", ["ccop", "point"])
def test_other_methods_train_on_the_new_regions(method, region_folder, tmp_path, monkeypatch):
    def losses(name):
        images, store = region_folder.images, region_folder.store
        overrides = ["dataloader.train.dataset.recipe=null", "train.max_iter=5"]
        cfg = config(tmp_path / name, images, store, *overrides, method=method)
        do_pretrain(cfg, False)
        return [line["total_loss"] for line in lines(tmp_path / name)]

    refreshed = losses("refreshed")
    assert rows(tmp_path / "refreshed/regions_epoch001.arrow")[1].startswith("features-v1+source=")
    monkeypatch.setattr(RefreshedLoader, "_refresh", lambda self, segment: self._first)
    monkeypatch.setattr(RefreshedLoader, "_found", lambda self, segment: self._first)
    old = losses("old")
    assert len(old) == 5 and refreshed[:3] == old[:3]
    assert refreshed[3] != old[3] and np.isfinite(refreshed).all()


def test_an_image_that_became_unreadable_is_replaced(region_folder, tmp_path, caplog):
    cfg = config(tmp_path, region_folder.images, region_folder.store)
    loader: PretrainLoader = instantiate(cfg.dataloader.train)
    records = loader.dataset.records()
    missing = str(tmp_path / "missing.arrow")
    make_regions(records[1:], missing, "grid-v1", workers=1)
    loader.dataset.store = RegionStore.open(missing)
    batch = loader.dataset.batch(0, 0, [0])
    assert f"has no regions for image {records[0]['image_id']!r}" in caplog.text
    # the views of the next image, with the random numbers of the first one
    file = loader.dataset.read(1)
    views = loader.dataset.views(*file.size, file.boxes, np.random.default_rng([0, 0, 1]))
    np.testing.assert_array_equal(batch.views[0].boxes[0], views[0].boxes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((96, 96), (96, 96)), ((640, 480), (256, 192)), ((4000, 40), (2240, 32)), ((20, 9), (32, 32))],
)
def test_network_inputs_have_about_the_area_and_sides_of_32(size, expected):
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    found = resize_to_area(image, 224)
    np.testing.assert_array_equal(found, cv2.resize(image, expected, interpolation=cv2.INTER_AREA))
