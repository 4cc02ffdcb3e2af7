"""Images that are added to a data set after its regions were made."""

from __future__ import annotations

import os

import pytest
from detectron2.structures import BoxMode
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore, generate, store
from region_pretrain.regions.generate import make_regions


def contents(path: str) -> dict:
    store = RegionStore.open(path)
    return {key: (store.size(key), store.boxes(key).tolist()) for key in store.keys()}


@pytest.mark.parametrize("shards", [1, 2])
def test_added_images_extend_the_store(tmp_path, records, monkeypatch, shards):
    for i, record in enumerate(records):
        side = 10 + i  # one object per image, the size of which decides whether a box covers it
        box = {"bbox": [0, 0, side, side], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        width, height = Image.open(record["file_name"]).size
        record.update(annotations=[box], width=width, height=height)
    recipe = "grid-v1+divisions=4"
    a, b = str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow")
    at_once = make_regions(records, a, recipe, workers=1)
    make_regions(records[::2], b, recipe, workers=1, part_size=2)
    searched = []
    process = generate._process

    def counted(recipe, record):
        searched.append(record["image_id"])
        return process(recipe, record)

    monkeypatch.setattr(generate, "_process", counted)
    for shard in range(shards):
        in_steps = make_regions(records, b, recipe, 1, (shard, shards), part_size=2)
    assert sorted(searched) == sorted(record["image_id"] for record in records[1::2])
    assert RegionStore.open(b).manifest["sha256"] == RegionStore.open(a).manifest["sha256"]
    assert RegionStore.open(b).manifest["image_list"] == RegionStore.open(a).manifest["image_list"]
    assert at_once["objects"] == 11 and at_once.pop("seconds_per_image")
    assert in_steps.pop("seconds_per_image") > 0 and in_steps == at_once
    assert not os.path.exists(f"{b}.parts")
    written = os.stat(b).st_mtime_ns
    make_regions(records, b, recipe, workers=1)  # nothing left to do
    assert len(searched) == 5 and os.stat(b).st_mtime_ns == written


def test_regions_of_removed_images_are_kept(tmp_path, records, caplog):
    out = str(tmp_path / "r.arrow")
    make_regions(records[:8], out, "grid-v1", workers=1)
    before = contents(out)
    with caplog.at_level("INFO", "region_pretrain"):
        assert make_regions(records[2:8], out, "grid-v1", workers=1)["images"] == 8
        assert "also has regions of 2 other images, which are kept" in caplog.text
    assert contents(out) == before
    assert make_regions(records[2:], out, "grid-v1", workers=1)["images"] == 11
    assert {key: contents(out)[key] for key in before} == before


def test_unreadable_added_images_count_against_all_images(tmp_path, records):
    out = str(tmp_path / "r.arrow")
    make_regions(records[:9], out, "grid-v1", workers=1)
    before = contents(out)
    for record in records[9:]:
        open(record["file_name"], "w").close()
    with pytest.raises(UserError, match="2 of 11 images cannot be read"):
        make_regions(records, out, "grid-v1", workers=1, max_unreadable=0.1)
    assert contents(out) == before
    assert make_regions(records, out, "grid-v1", workers=1, max_unreadable=0.2)["unreadable"] == 2
    assert contents(out) == before


def test_a_store_can_be_extended_where_mapped_files_cannot_be_replaced(
    tmp_path, records, monkeypatch
):
    replace = os.replace

    def of_windows(source, target):
        if f" {os.path.realpath(target)}" in open("/proc/self/maps").read():
            raise PermissionError(13, "file with a user-mapped section open", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", of_windows)
    monkeypatch.setattr(store, "_CAN_REPLACE_MAPPED", False)
    path = str(tmp_path / "a.arrow")
    assert make_regions(records[:2], path, "grid-v1", workers=1)["images"] == 2
    assert make_regions(records, path, "grid-v1", workers=1)["images"] == len(records)
    assert len(RegionStore.open(path)) == len(records)
