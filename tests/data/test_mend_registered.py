"""Registered data sets whose COCO json is fixed for training and evaluation."""

import copy
import glob
import json
import os
import shutil

import pytest
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator

from region_pretrain.config import load_config
from region_pretrain.data.catalog import get_records
from region_pretrain.data.coco_json import load_coco, mend_registered
from region_pretrain.errors import UserError


def no_area(data):
    for annotation in data["annotations"]:
        del annotation["area"]


def one_text_id(data):
    data["images"][0]["id"] = "a"
    for annotation in data["annotations"][:2]:
        annotation["image_id"] = "a"


@pytest.fixture
def registered(request):
    name = f"registered {request.node.name}"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_stock_data_sets_are_fixed(write_coco, registered):
    path, root = write_coco(no_area)
    register_coco_instances(registered, {}, path, root)
    data = mend_registered(registered, evaluated=True)
    metadata = MetadataCatalog.get(registered)
    assert metadata.json_file == data.json_file != path
    assert metadata.thing_classes == ["ant", "bee"]
    records = [DatasetCatalog.get(registered) for _ in range(3)]
    assert records[0] == records[1] == records[2] and records[1] is not records[2]
    assert not mend_registered(registered, evaluated=True).fixed  # now a correct one
    assert mend_registered(registered) is None


def test_a_config_that_registers_and_is_executed_again(write_coco, registered, tmp_path):
    path, root = write_coco(no_area)
    file = tmp_path / "own.py"
    file.write_text(
        "from detectron2.data import MetadataCatalog\n"
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances({registered!r}, {{}}, {path!r}, {root!r})\n"
        f"classes = MetadataCatalog.get({registered!r}).get('thing_classes', [])\n"
        "train = dict(norm=lambda: 1, count=len(classes))\n"
    )
    cfg = load_config(str(file))
    data = mend_registered(registered, evaluated=True)
    load, metadata = DatasetCatalog[registered], MetadataCatalog.get(registered)
    assert metadata.json_file == data.json_file != path
    assert instantiate(cfg.train.norm)() == 1
    assert DatasetCatalog[registered] is load and MetadataCatalog.get(registered) is metadata
    assert metadata.json_file == data.json_file and metadata.thing_classes == ["ant", "bee"]
    with pytest.raises(AssertionError, match="cannot be set to a different value"):
        metadata.json_file = path

    # Loaded again, e.g. in a notebook: the file's json is in effect, and is fixed again.
    assert load_config(str(file)).train.count == 2
    assert metadata.json_file == path and DatasetCatalog[registered] is not load
    assert mend_registered(registered, evaluated=True).fixed
    assert metadata.json_file == data.json_file


def test_pre_training_reads_the_mended_names(write_coco, registered):
    def with_backslashes(data):
        for image in data["images"]:
            image["file_name"] = f"sub\\{image['file_name']}"

    path, root = write_coco(with_backslashes)
    os.makedirs(f"{root}/sub")
    for image in glob.glob(f"{root}/*.*"):
        shutil.move(image, f"{root}/sub")
    register_coco_instances(registered, {}, path, root)
    records = get_records(registered, annotations=False)
    mended = load_coco(path, root).records
    assert [r["file_name"] for r in records] == [r["file_name"] for r in mended]
    assert len(records) == 3 and all(os.path.isfile(r["file_name"]) for r in records)


def test_training_needs_no_copy_and_evaluation_afterwards_does(write_coco, registered, cache):
    register_coco_instances(registered, {}, *write_coco(one_text_id))
    mend_registered(registered)
    assert not cache.exists() or not list(cache.iterdir())
    assert [r["image_id"] for r in DatasetCatalog.get(registered)] == ["2", "3", "a"]
    mend_registered(registered, evaluated=True)
    assert MetadataCatalog.get(registered).json_file == str(next(cache.glob("ann-*")))


def test_metadata_that_contradict_the_json(write_coco, registered):
    register_coco_instances(registered, {"thing_classes": ["bee", "ant"]}, *write_coco())
    with pytest.raises(
        UserError, match=r"thing_classes=\['bee', 'ant'\], but .* has \['ant', 'bee'\]"
    ):
        mend_registered(registered)


def test_own_loaders_keep_their_records(write_coco, registered):
    path, root = write_coco(no_area)
    own = load_coco(path, root).records[:2]
    DatasetCatalog.register(registered, lambda: own)
    MetadataCatalog.get(registered).set(json_file=path, image_root=root)
    assert mend_registered(registered) is None
    data = mend_registered(registered, evaluated=True)
    assert DatasetCatalog.get(registered) is own
    assert MetadataCatalog.get(registered).json_file == data.json_file != path


def test_records_without_a_json_get_one_for_their_evaluation(write_coco, registered, cache):
    records = load_coco(*write_coco()).records
    DatasetCatalog.register(registered, lambda: records)
    with pytest.raises(UserError, match="cannot be evaluated with COCO.*thing_classes"):
        mend_registered(registered, evaluated=True)
    MetadataCatalog.get(registered).thing_classes = ["ant", "bee"]
    assert mend_registered(registered) is None
    assert not hasattr(MetadataCatalog.get(registered), "json_file")
    mend_registered(registered, evaluated=True)
    written = json.loads(next(cache.glob("records-*")).read_text())
    assert len(written["annotations"]) == 6
    COCOEvaluator(registered, distributed=False)  # without an output_dir


def test_the_json_of_records_leaves_them_as_they_are(write_coco, registered, cache):
    def with_keypoints(data):
        for annotation in data["annotations"]:
            annotation.update(keypoints=[3, 4, 2], num_keypoints=1)
        for category in data["categories"]:
            category.update(keypoints=["nose"], skeleton=[])

    records = load_coco(*write_coco(with_keypoints)).records
    before = copy.deepcopy(records)
    DatasetCatalog.register(registered, lambda: records)
    MetadataCatalog.get(registered).thing_classes = ["ant", "bee"]
    for _ in range(2):
        mend_registered(registered, evaluated=True)
        del MetadataCatalog.get(registered).json_file
    assert records == before
    (path,) = cache.glob("records-*")  # equal records have one file
    written = json.loads(path.read_text())
    assert {tuple(a["keypoints"]) for a in written["annotations"]} == {(3.0, 4.0, 2)}
    assert f"{registered} as a COCO json" not in DatasetCatalog
