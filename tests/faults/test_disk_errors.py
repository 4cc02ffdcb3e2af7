"""Errors of the file system, as opposed to those of an image file."""

import errno
import os
import urllib.error

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.utils.file_io import PathManager
from PIL import Image

from region_pretrain.data.catalog import get_records
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.inspection import inspect
from region_pretrain.data.loader import PretrainLoader
from region_pretrain.engine.detection_data import DetectionTrainData
from region_pretrain.errors import UserError
from region_pretrain.images import (
    FileSystemFailure,
    SamePixels,
    UnreadableImage,
    opening,
    read_image,
)
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import make_regions

TRANSIENT = [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE]
NAMED = r"05\.png: the file system cannot read it: (OSError|TimeoutError): \[Errno"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(opening, "_WAITS", (0, 0, 0))


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    return root


@pytest.fixture
def fail(monkeypatch):
    """Let the next attempts to open ``05.png`` fail, also those of processes forked from now on."""

    def fail(code, times=10**9):
        original, failed = os.open, []

        def open_or_fail(path, *args, **settings):
            if str(path).endswith("05.png") and len(failed) < times:
                failed.append(path)
                raise OSError(code, os.strerror(code), path)
            return original(path, *args, **settings)

        monkeypatch.setattr(os, "open", open_or_fail)
        return failed

    return fail


def training(photos, views, workers=0):
    """All batches of two epochs, and the images that each contains."""
    dataset = PretrainDataset(f"folder://{photos}", views)
    loader = PretrainLoader(dataset, 4, num_workers=workers, seed=3)
    return [
        [t.clone() for view in batch.views for t in vars(view).values()]
        for batch in loader.iterate(0, 4)
    ]


def detection(photos, workers=0):
    records = [
        {**record, "height": 48, "width": 48, "annotations": []}
        for record in get_records(f"folder://{photos}")
    ]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    data = DetectionTrainData(records, mapper, 4, workers, seed=3, max_unreadable=1.0)
    return [[given["image"] for given in batch] for batch in data.iterate(0, 4)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(sum(a, []), sum(b, []), strict=True))


@pytest.mark.parametrize("code", TRANSIENT)
def test_an_error_that_passes_changes_no_batch(photos, soco_views, fail, code, caplog):
    expected = training(photos, soco_views), detection(photos)
    failed = fail(code, times=3)
    assert same(training(photos, soco_views), expected[0]) and len(failed) == 3
    failed.clear()
    assert same(detection(photos), expected[1]) and len(failed) == 3
    assert "replaced" not in caplog.text
    assert caplog.text.count("05.png: ") == 6 and caplog.text.count("trying again in 0 s") == 6


def test_an_error_that_passes_in_a_worker_changes_no_batch(photos, soco_views, fail):
    expected = training(photos, soco_views)
    fail(errno.EIO, times=1)  # in each worker
    assert same(training(photos, soco_views, workers=2), expected)


@pytest.mark.parametrize("code", TRANSIENT)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_lasts_ends_a_training(photos, soco_views, fail, code, workers):
    failed = fail(code)
    with pytest.raises(UserError, match=NAMED) as caught:
        training(photos, soco_views, workers)
    assert "\n" not in str(caught.value)
    if not workers:  # the exception of a worker is made anew
        assert not isinstance(caught.value, UnreadableImage) and len(failed) == 4
    with pytest.raises(UserError, match=NAMED):
        detection(photos, workers)


@pytest.mark.parametrize("code", TRANSIENT)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_lasts_ends_a_region_search(photos, tmp_path, fail, code, workers):
    records, out = get_records(f"folder://{photos}"), str(tmp_path / "r.arrow")
    fail(code)
    with pytest.raises(UserError, match=NAMED):
        make_regions(records, out, "shapes-v1", workers, part_size=4, max_unreadable=1.0)
    assert not os.path.exists(out) and not os.path.exists(f"{out}.unreadable.txt")


def test_a_region_search_is_continued_once_the_disk_is_back(photos, tmp_path, fail):
    records, out = get_records(f"folder://{photos}"), str(tmp_path / "r.arrow")
    failed = fail(errno.ESTALE, times=4)
    with pytest.raises(UserError, match=NAMED):
        make_regions(records, out, "shapes-v1", workers=1, part_size=4)
    assert len(failed) == 4
    assert make_regions(records, out, "shapes-v1", workers=1, part_size=4)["images"] == 8
    assert "05.png" in RegionStore.open(out)


def test_an_inspection_of_a_data_set_lists_all_errors(photos, fail):
    (photos / "02.png").write_bytes(b"no image")
    fail(errno.EIO)
    found = inspect(f"folder://{photos}")
    (error,) = found.problems
    assert "2 unreadable files" in error and sum(found.formats.values()) == 6


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EISDIR])
def test_an_error_of_the_file_is_one_of_the_image(photos, tmp_path, soco_views, fail, code, caplog):
    records = get_records(f"folder://{photos}")
    failed = fail(code)
    assert len(training(photos, soco_views)) == len(detection(photos)) == 4
    assert caplog.text.count("05.png: ") == 3 and caplog.text.count("replaced by the next") == 3
    assert len(failed) >= 3  # once per epoch: it is not tried again
    out = str(tmp_path / "r.arrow")
    summary = make_regions(records, out, "shapes-v1", workers=1)
    assert (summary["images"], summary["unreadable"]) == (7, 1)
    with pytest.raises(UnreadableImage, match="05.png: "):
        read_image(str(photos / "05.png"))


def test_an_error_while_the_file_is_read(photos):
    """A soft NFS mount opens a file, and then times out."""

    def stat(fd):
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    with pytest.raises(UserError, match=NAMED), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fstat", stat)
        read_image(str(photos / "05.png"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (urllib.error.HTTPError("https://x/05.png", 404, "Not Found", {}, None), UnreadableImage),
        (OSError("no such member"), UnreadableImage),
        (
            urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")),
            FileSystemFailure,
        ),
        (TimeoutError("timed out"), FileSystemFailure),
    ],
)
def test_errors_of_a_network(monkeypatch, error, kind):
    def opened(path, mode):
        raise error

    monkeypatch.setattr(PathManager, "open", opened)
    with pytest.raises(UserError, match=r"05\.png: .*cannot") as caught:
        read_image("https://x/05.png")
    assert type(caught.value) is kind


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT])
def test_a_mapper_that_opens_the_image_itself(photos, code):
    def mapper(record):
        raise OSError(code, os.strerror(code), record["file_name"])

    with pytest.raises(UserError, match=r"05\.png: .*cannot") as caught:
        SamePixels(mapper)({"file_name": str(photos / "05.png")})
    assert isinstance(caught.value, UnreadableImage) == (code == errno.ENOENT)
