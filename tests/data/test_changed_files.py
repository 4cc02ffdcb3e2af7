"""Image files that changed after their json was fixed."""

import json
import os
import unicodedata

import pytest
from PIL import Image

from region_pretrain.data.catalog import load_coco_images
from region_pretrain.data.coco_json import load_coco
from region_pretrain.errors import UserError


def without_sizes(data):
    for image in data["images"]:
        del image["width"], image["height"]


def test_sizes_are_those_of_replaced_files(write_coco, cache):
    path, root = write_coco(without_sizes)
    first = load_coco(path, root)
    assert first.json_file == str(next(cache.glob("ann-*")))
    width, height = first.records[1]["width"], first.records[1]["height"]
    with Image.open(first.records[1]["file_name"]) as image:
        larger = image.resize((2 * width, 2 * height))
    larger.save(first.records[1]["file_name"])
    again = load_coco(path, root)
    assert (again.records[1]["width"], again.records[1]["height"]) == (2 * width, 2 * height)
    written = json.loads(open(again.json_file).read())["images"][1]
    assert (written["width"], written["height"]) == (2 * width, 2 * height)


def test_names_are_those_of_renamed_files(write_coco, cache):
    nfc, nfd = (unicodedata.normalize(form, "Küche.jpg") for form in ("NFC", "NFD"))

    def rename(data):
        data["images"][1]["file_name"] = nfc

    path, root = write_coco(rename)
    os.rename(f"{root}/1.jpg", f"{root}/{nfd}")
    data = load_coco(path, root)
    assert data.fixed and data.json_file != path and data.records[1]["file_name"].endswith(nfd)
    os.rename(f"{root}/{nfd}", f"{root}/{nfc}")
    data = load_coco(path, root)
    assert not data.fixed and data.json_file == path
    assert data.records[1]["file_name"] == f"{root}/{nfc}"
    os.remove(f"{root}/{nfc}")
    with pytest.raises(UserError, match="1 of the 3 images of .* do not exist"):
        load_coco(path, root)


def test_pre_training_reads_the_files_that_fine_tuning_reads(write_coco):
    nfc, nfd = (unicodedata.normalize(form, "Küche.jpg") for form in ("NFC", "NFD"))

    def rename(data):
        data["images"][0]["file_name"] = ".\\0.jpg"
        data["images"][1]["file_name"] = nfd

    path, root = write_coco(rename)
    os.rename(f"{root}/1.jpg", f"{root}/{nfc}")
    text = open(path).read()
    with open(path, "w", encoding="utf-8-sig") as file:
        file.write(text)
    files = [record["file_name"] for record in load_coco_images(path, root)]
    assert files == [record["file_name"] for record in load_coco(path, root).records]
    assert all(map(os.path.exists, files)) and len(files) == 3


def test_values_that_are_null(write_coco):
    path, root = write_coco(lambda data: data["annotations"][0].update(keypoints=None))
    data = load_coco(path, root)
    assert len(data.records[0]["annotations"]) == 2
    assert "keypoints" not in data.records[0]["annotations"][0]

    def unlabelled(data):
        del data["annotations"]
        data["categories"] = None

    assert load_coco(*write_coco(unlabelled)).classes == []
