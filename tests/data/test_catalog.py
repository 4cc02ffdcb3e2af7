"""Records of folders, COCO's and ImageNet's layouts; every wrong input is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from empty_files import touch
from PIL import Image

from region_pretrain.config import get_config
from region_pretrain.data.catalog import (
    get_records,
    load_coco_images,
    register_image_folder,
)
from region_pretrain.data.inspection import prepare_labels
from region_pretrain.data.sources import register
from region_pretrain.errors import UserError


@pytest.fixture
def name(request) -> str:
    """A data set name that is free again afterwards."""
    name = f"test_{request.node.name}"
    yield name
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)


@pytest.fixture
def coco(tmp_path) -> Path:
    """Images and their json in COCO's layout; the ids are not sorted."""
    ids = [30, 9, 581921]
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": 10 + i, "width": 20 + i} for i in ids
    ]
    touch(tmp_path / "train2017", *(image["file_name"] for image in images))
    annotation = {"id": 1, "image_id": 9, "category_id": 5, "bbox": [1, 2, 3, 4], "iscrowd": 0}
    content = {
        "images": images,
        "annotations": [annotation],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_registered_folder_is_an_ordinary_detectron2_data_set(tmp_path, name):
    touch(tmp_path, "b.jpg", "a.jpg")
    assert register_image_folder(name, str(tmp_path)) == name
    register_image_folder(name, str(tmp_path))  # again: no effect
    assert DatasetCatalog.get(name) == get_records(name) == get_records(f"folder://{tmp_path}")
    with pytest.raises(UserError, match="is taken"):
        register_image_folder(name, str(tmp_path / "other"))
    with pytest.raises(UserError, match="'coco_2017_train' is taken"):
        register_image_folder("coco_2017_train", str(tmp_path))


def test_nothing_is_read_when_registering(tmp_path, name):
    register_image_folder(name, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such image folder: .*nowhere"):
        get_records(name)


def test_a_folder_is_labelled_only_on_request(tmp_path, name):
    files = ["n02/n02_1.JPEG", "n01/n01_7.JPEG", "n10/n10_2.JPEG", "n01/n01_10.JPEG"]
    touch(tmp_path, *files)
    register_image_folder(name, str(tmp_path))
    assert [r["image_id"] for r in get_records(name)] == sorted(files)
    assert not any("category_id" in r for r in get_records(name))

    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)
    register_image_folder(name, str(tmp_path), with_labels=True)
    labels = {r["image_id"]: r["category_id"] for r in get_records(name)}
    assert labels == {files[0]: 1, files[1]: 0, files[2]: 2, files[3]: 0}
    assert MetadataCatalog.get(name).thing_classes == ["n01", "n02", "n10"]

    touch(tmp_path, "stray.JPEG")
    with pytest.raises(UserError, match=r"stray\.JPEG has no label: it is not in a class folder"):
        get_records(name)


def test_coco_json_gives_detectron2s_records_without_the_labels(coco):
    json_file, root = str(coco / "instances.json"), str(coco / "train2017")
    expected = load_coco_json(json_file, root)
    for record in expected:
        del record["annotations"]
    assert load_coco_images(json_file, root) == expected
    assert [r["image_id"] for r in expected] == [9, 30, 581921]


def test_coco_folder_gives_the_same_keys_and_files_as_the_json(coco):
    root = str(coco / "train2017")
    listed = load_coco_images(None, root)
    from_json = load_coco_images(str(coco / "instances.json"), root)
    assert [(r["image_id"], r["file_name"]) for r in listed] == [
        (r["image_id"], r["file_name"]) for r in from_json
    ]
    touch(coco / "train2017", "COCO_train2014_000000000012.jpg")  # the names of 2014
    assert [r["image_id"] for r in load_coco_images(None, root)] == [9, 12, 30, 581921]
    touch(coco / "train2017", "cover.jpg")
    with pytest.raises(UserError, match=r"cover\.jpg: its name does not end with COCO's image id"):
        load_coco_images(None, root)


def test_image_ids_without_labels_are_those_with_labels(coco_folder):
    """Keys of regions are ids: pandas writes 30.0, and annotations may have "30"."""
    path = coco_folder / "ann.json"
    data = json.loads(path.read_text())
    for image in data["images"]:
        image["id"] = float(image["id"])
    for annotation in data["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    path.write_text(json.dumps(data))
    name = f"coco://{path}?images={coco_folder / 'images'}"
    plain = get_records(name, annotations=False, boxes=True)
    full = get_records(name, annotations=True)
    assert [r["image_id"] for r in plain] == [r["image_id"] for r in full] == [2, 8, 9, 30, 77, 581]
    assert [len(r["annotations"]) for r in plain] == [2] * 6


def test_registered_sets_without_a_folder_are_read_as_by_detectron2(coco_folder, tmp_path):
    """Complete paths in the json, and an ``image_root`` of "", absent or elsewhere."""
    data = json.loads((coco_folder / "ann.json").read_text())
    for image in data["images"]:
        image["file_name"] = str(coco_folder / "images" / image["file_name"])
    data["images"].append(data["images"][0])  # pycocotools merges them
    path = tmp_path / "complete.json"
    path.write_text(json.dumps(data))
    for root in ("", str(tmp_path / "absent"), str(tmp_path)):
        register_coco_instances("complete", {}, str(path), root)
        try:
            found = get_records("complete", annotations=False)
            expected = DatasetCatalog.get("complete")
        finally:
            DatasetCatalog.remove("complete")
            MetadataCatalog.remove("complete")
        assert len(found) == 6
        for key in ("file_name", "image_id"):
            assert [r[key] for r in found] == [r[key] for r in expected]


def test_built_in_sets_lie_under_the_datasets_root(tmp_path):
    """A fresh interpreter, as the root is read at import; one set has no json."""
    touch(tmp_path / "coco/train2017", "000000000009.jpg", "000000000025.jpg")
    touch(tmp_path / "coco/unlabeled2017", "000000000008.jpg")
    touch(tmp_path / "imagenet/train", "n01/n01_7.JPEG")
    image = {"id": 8, "file_name": "000000000008.jpg", "height": 480, "width": 640}
    (tmp_path / "coco/annotations").mkdir()
    info = tmp_path / "coco/annotations/image_info_unlabeled2017.json"
    info.write_text(json.dumps({"images": [image]}))
    code = (
        "import json; from region_pretrain.data.catalog import get_records; "
        "print(json.dumps(get_records(['coco_2017_train_images', 'coco_2017_unlabeled_images', "
        "'imagenet_train'])))"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [r["image_id"] for r in records] == [9, 25, 8, "n01/n01_7.JPEG"]
    assert (records[2]["height"], records[2]["width"]) == (480, 640)
    assert all(os.path.isfile(r["file_name"]) for r in records)


def test_several_sets_follow_one_another(tmp_path):
    touch(tmp_path / "one", "b.jpg", "a.jpg")
    touch(tmp_path / "two", "0.jpg")
    records = get_records([f"folder://{tmp_path}/one", f"folder://{tmp_path}/two"])
    assert [r["image_id"] for r in records] == ["a.jpg", "b.jpg", "0.jpg"]


def test_same_key_in_two_sets_is_refused(tmp_path, coco, name):
    touch(tmp_path / "one", "a.jpg")
    touch(tmp_path / "two", "a.jpg")
    one, two = f"folder://{tmp_path}/one", f"folder://{tmp_path}/two"
    with pytest.raises(UserError, match=f"image 'a.jpg' is in '{one}' and '{two}'"):
        get_records([one, two])
    with pytest.raises(UserError, match=f"image 'a.jpg' is in '{one}' twice"):
        get_records([one, one])
    # In a region store a key is text: 9 and "9" are the same.
    DatasetCatalog.register(name, lambda: [{"file_name": "x", "image_id": i} for i in (9, "9")])
    with pytest.raises(UserError, match=f"'9' is in '{name}' twice.*give each its own image_id"):
        get_records(name)
    # Without regions nothing is looked up by key.
    found = get_records([one, two, one, name], unique=False)
    assert [r["image_id"] for r in found] == ["a.jpg", "a.jpg", "a.jpg", 9, "9"]


def test_an_unknown_name_is_refused_with_similar_ones(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'coco_2017_trian'; did you mean .*coco_2017_train"):
        get_records("coco_2017_trian")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="'photos'; for a folder, write folder://photos"):
        get_records("photos")
    with pytest.raises(UserError, match="no data set is given"):
        get_records([])


def test_a_missing_folder_json_or_image_is_named(tmp_path, coco):
    with pytest.raises(UserError, match="no such image folder: .*/missing"):
        get_records(f"folder://{tmp_path}/missing")
    with pytest.raises(UserError, match="no such image folder: ''"):
        get_records("folder://")
    touch(tmp_path / "empty", "readme.txt")
    with pytest.raises(UserError, match="empty has no images"):
        get_records(f"folder://{tmp_path}/empty")
    root = str(coco / "train2017")
    with pytest.raises(UserError, match=r"no such file: .*missing\.json"):
        load_coco_images(str(coco / "missing.json"), root)
    with pytest.raises(UserError, match=r"no such image folder: .*/train2018"):
        load_coco_images(str(coco / "instances.json"), str(coco / "train2018"))


@pytest.mark.parametrize("text", ['{"images": [', "[]", "{}", '{"images": [{"id": 1}]}'])
def test_a_json_of_another_format_is_named(coco, text):
    path = coco / "wrong.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"wrong\.json is not a COCO json"):
        load_coco_images(str(path), str(coco / "train2017"))


def test_json_without_images_is_named(coco):
    path = coco / "wrong.json"
    path.write_text('{"images": []}')
    with pytest.raises(UserError, match=r"wrong\.json lists no images"):
        load_coco_images(str(path), str(coco / "train2017"))


def test_a_missing_built_in_set_is_refused_with_the_folder(monkeypatch, name):
    json_file = "/nowhere/coco/annotations/instances_val2017.json"
    DatasetCatalog.register(name, lambda: load_coco_json(json_file, "/nowhere/coco/val2017", name))
    with pytest.raises(UserError, match="instances_val2017.*DETECTRON2_DATASETS"):
        get_records(name)


def test_registered_sets_without_records_or_keys_are_refused(name):
    DatasetCatalog.register(name, list)
    with pytest.raises(UserError, match="has no images"):
        get_records(name)
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: [{"file_name": "x.jpg"}])
    with pytest.raises(UserError, match="without file_name or image_id"):
        get_records(name)


def test_images_of_a_12_bit_camera_are_nearly_black(tmp_path, caplog):
    folder = tmp_path / "xray"
    folder.mkdir()
    for i in range(20):
        values = np.full((8, 8), 4095 if i == 16 else 300, np.uint16)
        Image.fromarray(values).save(folder / f"{i:02}.png")
    (folder / "20.png").write_bytes(b"")
    Image.new("L", (8, 8)).save(folder / "00.png")  # one of 8 bits
    warning = "values up to 4095 of 65,535 only, and are read as nearly black"
    for _ in range(2):
        get_records(f"folder://{folder}")
    assert caplog.text.count(warning) == 1 and "xray/" in caplog.text
    caplog.clear()
    get_records(f"folder://{folder}?bits=12")
    Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(folder / "00.png")
    get_records(f"folder://{folder}?bands=1,1,1")
    assert warning not in caplog.text


def test_a_few_images_of_a_14_bit_camera_are_noticed_and_before_a_fine_tuning(tmp_path, caplog):
    images = []
    for i in range(60):
        deep = i in (23, 47)
        values = np.full((30, 40), 16383 if deep else 99, np.uint16 if deep else np.uint8)
        Image.fromarray(values).save(tmp_path / f"{i:02}.png")
        images.append({"id": i, "file_name": f"{i:02}.png", "width": 40, "height": 30})
    warning = "values up to 16383 of 65,535 only, and are read as nearly black"
    get_records(f"folder://{tmp_path}")
    assert warning in caplog.text
    caplog.clear()
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [2, 3, 9, 9], "area": 81, "iscrowd": 0}
    data = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "all.json").write_text(json.dumps(data))
    coco = f"coco://{tmp_path}/all.json?images={tmp_path}"
    register(coco)
    prepare_labels(get_config("detection/faster_rcnn_r50_c4_voc.py"), {"train": [coco]})
    assert warning in caplog.text
