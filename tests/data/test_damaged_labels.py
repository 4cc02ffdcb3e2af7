"""Damaged labels that pycocotools and Detectron2 accept, and stray files in folders of VOC."""

import codecs
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from voc_files import make_voc

from region_pretrain.config import get_config
from region_pretrain.data import coco_fixes
from region_pretrain.data.catalog import get_records
from region_pretrain.data.coco_annotations import _covers
from region_pretrain.data.coco_json import load_coco
from region_pretrain.data.few_label import ImageSubset, write_subset
from region_pretrain.data.inspection import prepare_labels
from region_pretrain.errors import UserError

PIXELS = 40 * 60


def first(**values):
    return lambda data: data["annotations"][0].update(values)


@pytest.mark.parametrize(
    "counts",
    [[600, 10], [600, 2400], [-5, PIXELS + 5], [[600], 1800], [600.5, 1799.5], "0000", "abc", "é"]
    + ["PPYo0", "PPYo", "~~~", "oooooooooo0"],
)
def test_masks_whose_runs_are_not_their_pixels_are_refused(write_coco, counts):
    path, root = write_coco(first(segmentation={"size": [40, 60], "counts": counts}))
    with pytest.raises(UserError, match="RLE mask in annotation 1 whose runs are damaged or"):
        load_coco(path, root)


@pytest.mark.parametrize("size", [None, 40, [60, 40], ["40", "60"]])
def test_masks_of_another_size_are_refused(write_coco, size):
    path, root = write_coco(first(segmentation={"size": size, "counts": [PIXELS]}))
    with pytest.raises(UserError, match="has an RLE mask of size .* in annotation 1"):
        load_coco(path, root)


def test_runs_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 400, 2)
        mask = rng.random((height, width)) < rng.choice([0.0, 0.001, 0.3, 0.97, 1.0])
        counts = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
        assert _covers(counts, height * width)
        assert not _covers(counts, height * width + 1) and not _covers(counts + "1", height * width)


@pytest.mark.parametrize(
    ("keypoints", "expected"),
    [
        ([None, None, 0, 5, 6, 2], [0.5, 0.5, 0, 5.5, 6.5, 2]),
        (["1", "2.5", "2", 5, 6, 1], [1.5, 3.0, 2, 5.5, 6.5, 1]),
        ([None, None, 2, 5, 6, 2], None),
        ([float("nan"), 1, 2, 5, 6, 2], None),
        (["x", 1, 2, 5, 6, 2], None),
        ([1, 2, 2, 5, 6], None),
        ({"x": 1}, None),
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_keypoints_are_numbers(write_coco, keypoints, expected, counted):
    values = {"keypoints": keypoints, **({"num_keypoints": 2} if counted else {})}
    path, root = write_coco(first(**values))
    if expected is None:
        with pytest.raises(UserError, match="has keypoints in annotation 1 that are not"):
            load_coco(path, root)
    else:
        assert load_coco(path, root).records[0]["annotations"][0]["keypoints"] == expected


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 3, "name": "ant"}, {"id": 7, "name": "bee"}, {"id": 3, "name": "bee"}],
        [{"id": 3, "name": "ant"}, {"id": 7, "name": "bee"}, {"id": 3, "name": "cow"}],
    ],
)
def test_an_id_of_two_classes_is_refused(write_coco, categories):
    path, root = write_coco(lambda data: data.update(categories=categories))
    with pytest.raises(UserError, match="has two categories with id 3: renumber"):
        load_coco(path, root)


@pytest.mark.parametrize("ids", [("1", "01"), ("--1", "2"), ("a", "b")])
def test_ids_that_are_not_integers_are_numbered(write_coco, ids):
    def change(data):
        for category, new in zip(data["categories"], ids, strict=True):
            for annotation in data["annotations"]:
                if annotation["category_id"] == category["id"]:
                    annotation["category_id"] = new
            category["id"] = new

    data = load_coco(*write_coco(change))
    assert data.category_ids == [1, 2] and data.classes == ["ant", "bee"]
    assert [a["category_id"] for r in data.records for a in r["annotations"]] == [0, 1] * 3


@pytest.mark.parametrize("limit", [1, 99])
def test_files_are_found_as_the_system_finds_them(tmp_path, monkeypatch, limit):
    """APFS ignores the Unicode form of a name; its listings have the stored one."""
    stored = unicodedata.normalize("NFD", "bär.jpg")
    (tmp_path / stored).touch()
    exists = os.path.exists
    monkeypatch.setattr(coco_fixes, "_LISTED_FOLDER", limit)
    monkeypatch.setattr(os.path, "exists", lambda p: exists(unicodedata.normalize("NFD", p)))
    images = [{"file_name": unicodedata.normalize("NFC", "bär.jpg")}, {"file_name": "cow.jpg"}]
    assert coco_fixes.missing_files(images, str(tmp_path)) == [str(tmp_path / "cow.jpg")]


def test_what_archives_and_editors_add_to_voc_is_not_read(tmp_path):
    root = make_voc(tmp_path / "mine", ["person", "car"], {"train": [0, 1], "val": [2]})
    (root / "Annotations/._000000.xml").write_bytes(b"\0\5\x16\7")
    listing = root / "ImageSets/Main/val.txt"
    listing.write_bytes(codecs.BOM_UTF8 + listing.read_bytes())
    assert len(get_records(f"voc://{root}?split=train")) == 2
    name = f"voc://{root}?split=val"
    assert [record["image_id"] for record in get_records(name)] == ["000002"]
    cfg = get_config("detection/faster_rcnn_r50_c4_voc.py")
    with pytest.raises(UserError, match="val.txt begins with a byte order mark"):
        prepare_labels(cfg, {"test": [name]})


def test_a_subset_of_images_with_ids_of_numpy_is_written(tmp_path):
    dicts = [{"image_id": np.int64(i), "file_name": f"{i}.jpg"} for i in range(3)]
    write_subset(ImageSubset(["mine"], dicts, [2, 0], seed=np.int64(3)), str(tmp_path))
    selection = json.loads(Path(tmp_path / "labelled_images.json").read_text())
    assert (selection["image_ids"], selection["seed"]) == ([0, 2], 3)
