"""A run is not continued silently on other data than it was started with."""

import gzip
import os
import re
import shutil
import socket
import time

import cv2
import pytest
from detectron2.config import LazyCall as L
from detectron2.utils import comm
from fault_runs import FolderLoader
from omegaconf import OmegaConf
from tiny_run import Loader, make_config, train_in_process

from region_pretrain.data.catalog import get_records
from region_pretrain.data.contents import Contents
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.loader import PretrainLoader
from region_pretrain.engine.detection_data import DetectionTrainData
from region_pretrain.engine.fingerprint import Fingerprint, check_same_data
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import launch
from region_pretrain.errors import UserError
from region_pretrain.regions.generate import make_regions


def remove(folder):
    (folder / "sub/03.png").unlink()
    return "removed images: 1 (e.g. '{0}/sub/03.png')"


def remove_four(folder):
    for name in ("00", "02", "04", "06"):
        (folder / f"{name}.png").unlink()
    return "removed images: 4 (e.g. '{0}/00.png', '{0}/02.png', '{0}/04.png')"


def add(folder):
    shutil.copy(folder / "00.png", folder / "new\n.png")
    return "new images: 1 (e.g. '{0}/new\\n.png')"


def rename(folder):
    (folder / "00.png").rename(folder / "99.png")
    return "removed images: 1 (e.g. '{0}/00.png'); new images: 1 (e.g. '{0}/99.png')"


def replace(folder):
    shutil.copy2(folder / "02.png", folder / "00.png")
    return "images of another size: 1 (e.g. '{0}/00.png')"


def empty(folder):
    (folder / "00.png").write_bytes(b"")
    return "images of another size: 1 (e.g. '{0}/00.png')"


def touch(folder):
    os.utime(folder / "00.png", (1, 1))
    return "images modified without a change of size: 1 (e.g. '{0}/00.png')"


CHANGES = [remove, remove_four, add, rename, replace, empty, touch]


def fingerprint(loader, folder, settings=None, **options):
    folder.mkdir(exist_ok=True)
    cfg = OmegaConf.create({"dataloader": {"train": settings or {"size": 32, "num_workers": 2}}})
    return Fingerprint(loader, cfg, str(folder), **options)


def refusal(saved, now):
    with pytest.raises(UserError) as refused:
        now.compare("model_0000005.pth", saved)
    text = str(refused.value)
    assert text.startswith("the training data is not that of model_0000005.pth: ")
    assert "train.allow_changed_data=True" in text and "\n" not in text
    return text


@pytest.fixture
def loader(region_folder, soco_views):
    def make(store=region_folder.store):
        names = f"folder://{region_folder.images}"
        return PretrainLoader(PretrainDataset(names, soco_views, store, max_unreadable=0.5), 2)

    return make


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_images_are_named(region_folder, loader, tmp_path, change):
    out = tmp_path / "out"
    saved = fingerprint(loader(), out).entry()
    fingerprint(loader(), out).compare("x", saved)  # the same data
    expected = change(region_folder.images).format(region_folder.images)
    store = region_folder.store if change not in (add, rename) else None
    assert expected in refusal(saved, fingerprint(loader(store), out))
    fingerprint(loader(store), out, allow_changed_data=True).compare("x", saved)


def test_other_regions_and_settings_are_named(region_folder, loader, tmp_path):
    out = tmp_path / "out"
    saved = fingerprint(loader(), out).entry()
    records = get_records(f"folder://{region_folder.images}")
    other = str(tmp_path / "again.arrow")
    make_regions(records, other, "shapes-v1", workers=1)
    fingerprint(loader(other), out).compare("x", saved)  # made again, they are the same
    make_regions(records, str(tmp_path / "grid.arrow"), "grid-v1", workers=1)
    assert "other regions" in refusal(saved, fingerprint(loader(str(tmp_path / "grid.arrow")), out))
    fingerprint(loader(), out, {"size": 32, "num_workers": 9}).compare("x", saved)
    text = refusal(saved, fingerprint(loader(), out, {"size": 48}))
    assert "dataloader.train: - {size: 32}, + {size: 48}" in text


def test_other_boxes_and_another_order_are_noticed(tmp_path):
    def detection(*records):
        return DetectionTrainData(list(records), dict, 1)

    def record(name, box):
        annotations = [{"bbox": box, "category_id": 1}]
        return {"image_id": name, "annotations": annotations}

    a, b = record("a", [0, 0, 4, 4]), record("b", [1, 1, 2, 2])
    saved = fingerprint(detection(a, b), tmp_path).entry()
    fingerprint(detection(a, b), tmp_path).compare("x", saved)
    moved = record("b", [1, 1, 2, 3])
    text = refusal(saved, fingerprint(detection(a, moved), tmp_path))
    assert "images with other labels: 1 (e.g. 'b')" in text
    assert "another order of the images" in refusal(saved, fingerprint(detection(b, a), tmp_path))


def test_a_checkpoint_without_a_fingerprint_is_refused_or_accepted(loader, tmp_path):
    for saved in (None, {}, {"images": 3}, []):
        assert "has no fingerprint" in refusal(saved, fingerprint(loader(), tmp_path / "out"))
    fingerprint(loader(), tmp_path / "out", allow_changed_data=True).compare("x", None)


def test_without_the_list_of_files_only_their_numbers_are_compared(region_folder, loader, tmp_path):
    out = tmp_path / "out"
    saved = fingerprint(loader(), out).entry()
    (listing,) = out.iterdir()
    assert gzip.decompress(listing.read_bytes()).count(b"\n") == saved["images"] == 12
    remove(region_folder.images)
    for damage in (b"", b"\x1f\x8b", gzip.compress(b"1 2 - 'x'\n")):
        listing.write_bytes(damage)
        text = refusal(saved, fingerprint(loader(), out))
        assert "11 instead of 12 images (the list of their names is missing)" in text


def images(folder, count):
    folder.mkdir()
    for i in range(count):
        cv2.imwrite(str(folder / f"{i:02d}.png"), cv2.UMat(8, 8, cv2.CV_8UC3).get())


def config(tmp_path, **train):
    cfg = make_config(tmp_path / "run", **{"epochs": 4, **train})
    cfg.dataloader.train = L(FolderLoader)(
        folder=str(tmp_path / "images"), total_batch_size=2, seed="${train.seed}"
    )
    return cfg


def test_a_resumed_run_is_refused_or_continues_by_permission(tmp_path, monkeypatch):
    images(tmp_path / "images", 12)
    do_pretrain(config(tmp_path))
    (tmp_path / "run/model_final.pth").unlink()
    (tmp_path / "run/last_checkpoint").write_text("model_0000017.pth")
    before = (tmp_path / "run/metrics.json").read_text()
    (tmp_path / "images/05.png").unlink()
    (tmp_path / "images/07.png").unlink()
    with pytest.raises(UserError, match=r"removed images: 2 \(e.g. '.*05.png', '.*07.png'\)"):
        do_pretrain(config(tmp_path), resume=True)
    assert (tmp_path / "run/metrics.json").read_text() == before
    # 4 epochs of 5 batches instead of 6
    do_pretrain(config(tmp_path, allow_changed_data=True), resume=True)
    assert "continuing with the data as it is now" in (tmp_path / "run/log.txt").read_text()
    assert (tmp_path / "run/metrics.json").read_text().count("\n") == 20
    assert len(list((tmp_path / "run").glob("data_files-*.txt.gz"))) == 2
    do_pretrain(config(tmp_path), resume=True)  # the newest checkpoint has seen the new data


def test_a_hundred_thousand_files_take_little_time(tmp_path):
    for i in range(200):  # links to few files: the test needs as many names, not as much disk
        (tmp_path / "files" / f"{i:03d}").mkdir(parents=True)
        (tmp_path / "files" / f"{i:03d}" / "0.jpg").touch()
    names = [str(tmp_path / "files" / f"{i % 200:03d}" / "0.jpg") for i in range(100_000)]

    class Many:
        def contents(self):
            return Contents(len(names), lambda i: (names[i], None))

    began = time.perf_counter()
    saved = fingerprint(Many(), tmp_path / "out").entry()
    seconds = time.perf_counter() - began
    assert saved["images"] == 100_000 and seconds < 30, seconds
    print(f"{seconds:.2f} s")


def test_an_error_before_the_first_step_does_not_wait_for_the_files(tmp_path, monkeypatch):
    closed = []
    close = Fingerprint.close
    monkeypatch.setattr(Fingerprint, "close", lambda self: closed.append(self) or close(self))
    (tmp_path / "damaged.pth").write_text("x")
    cfg = make_config(tmp_path / "run", init_checkpoint=f"{tmp_path}/damaged.pth")
    with pytest.raises(UserError, match="damaged.pth"):
        do_pretrain(cfg)
    assert len(closed) == 1


def test_an_error_while_files_are_examined_reaches_the_run_and_an_end_stops_it(tmp_path):
    class Broken:
        def contents(self):
            return Contents(1, lambda i: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        fingerprint(Broken(), tmp_path).entry()

    class Slow:
        def contents(self):
            return Contents(100_000, lambda i: ("x", time.sleep(0.001)))

    running = fingerprint(Slow(), tmp_path)
    running.close()
    with pytest.raises(RuntimeError, match="the run has ended"):
        running.entry()


class Copy(Loader):
    """A copy of a data set on one machine."""

    def __init__(self, names, regions="", num_images=40):
        super().__init__(num_images=num_images)
        self._names, self._regions = names, regions

    def contents(self):
        return Contents(len(self._names), lambda i: (self._names[i], None), self._regions)


def compare_copies():
    rank, names = comm.get_rank(), ["a.png", "b.png"]
    socket.gethostname = lambda: f"node{rank}"
    check_same_data(Copy([f"/disk{rank}/{name}" for name in names]))
    for other, found in (
        (Copy(names[:1]), "1 images, 5 iterations per epoch"),
        (Copy(names, num_images=48), "2 images, 6 iterations per epoch"),
        (Copy(names[::-1]), "other images, or another order"),
        (Copy(names, "f00d"), "other regions"),
    ):
        text = (
            "is not that of rank 0 on node0 (2 images, 5 iterations per epoch): rank 1 on node1: "
        )
        with pytest.raises(UserError, match=re.escape(f"{text}{found}. Make the copies")):
            check_same_data(other if rank else Copy(names))


def test_processes_with_different_copies_of_the_data_are_named():
    launch(compare_copies, 2, device="cpu")


def train_on_different_copies(folder):
    train_in_process(folder, False, loader={"num_images": 40 - 8 * comm.get_rank()})


def test_a_run_on_different_copies_ends_before_its_first_step(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        launch(train_on_different_copies, 2, device="cpu", args=(str(tmp_path),))
    assert ended.value.code == 2
    assert "4 iterations per epoch. Make the copies" in capfd.readouterr().err
    assert not (tmp_path / "metrics.json").exists()
