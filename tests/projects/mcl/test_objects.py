"""Annotated objects cut out of scenes, as images with one class each."""

import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from region_pretrain.data.catalog import get_records
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.shapes import shapes
from region_pretrain.errors import UserError
from region_pretrain.projects.mcl.objects import object_crops
from region_pretrain.projects.soco import SoCoViews


@pytest.fixture
def views():
    return SoCoViews([16, 16], ["crop"], Photometry(), Photometry())


def register_scene(name, path, annotations, **size):
    record = {"file_name": str(path), "image_id": 7, "annotations": annotations, **size}
    DatasetCatalog.register(name, lambda: [record])


def annotation(x, y, w, h, category, **more):
    box = {"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
    return {**box, **more}


def test_objects_are_cut_out_with_context(tmp_path, views, request):
    path = tmp_path / "scene.png"
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:20, 20:40] = 200
    cv2.imwrite(str(path), image)
    annotations = [
        annotation(20, 10, 20, 10, 3),
        annotation(0, 0, 60, 40, 1),
        annotation(5, 5, 7, 30, 2),  # below 8 pixels
        annotation(0, 0, 30, 30, 4, iscrowd=1),
    ]
    register_scene(f"{request.node.name}_scene", path, annotations, width=60, height=40)
    name = object_crops(f"{request.node.name}_scene", context=1.5)
    records = get_records(name)
    assert [r["image_id"] for r in records] == ["7#0", "7#1"]
    assert [r["category_id"] for r in records] == [3, 1]
    # Sides times 1.5 about the centre (30, 15): 15 to 45 and 7.5 to 22.5; the other is clipped.
    assert [r["crop"] for r in records] == [[15, 8, 45, 22], [0, 0, 60, 40]]
    data = PretrainDataset(name, views, labels=True)
    np.testing.assert_array_equal(data.read(0)[0].decode(), image[8:22, 15:45])
    assert data.batch(0, 0, [1, 0]).labels.tolist() == [1, 3]


def test_objects_of_shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    scenes = shapes(split="train", size=4, side=64, seed=11)
    name = object_crops([scenes], context=1.2)
    records = get_records(name)
    with open(MetadataCatalog.get(scenes).json_file) as f:
        boxes = json.load(f)["annotations"]
    large = [b for b in boxes if min(b["bbox"][2:]) >= 8]
    assert len(records) == len(large) and object_crops([scenes], context=1.2) == name
    assert [r["category_id"] for r in records] == [b["category_id"] - 1 for b in large]
    assert MetadataCatalog.get(name).thing_classes == MetadataCatalog.get(scenes).thing_classes


def test_objects_that_cannot_be_cut_out_are_refused(tmp_path, request):
    with pytest.raises(UserError, match="context=0.5"):
        object_crops("anything", context=0.5)
    path = tmp_path / "scene.png"
    register_scene(
        f"{request.node.name}_small", path, [annotation(0, 0, 4, 4, 0)], width=9, height=9
    )
    with pytest.raises(UserError, match="no box in .*_small has 8 pixels"):
        get_records(object_crops(f"{request.node.name}_small"))
    register_scene(f"{request.node.name}_bare", path, [annotation(0, 0, 9, 9, 0)])
    with pytest.raises(UserError, match="has no width and height"):
        get_records(object_crops(f"{request.node.name}_bare"))
