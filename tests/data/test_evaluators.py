"""One evaluator, several, or a class derived from Detectron2's: all have the same checks."""

import json

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Boxes, BoxMode, Instances
from voc_files import make_voc

from region_pretrain.config import get_config, load_config
from region_pretrain.data import sources
from region_pretrain.data.evaluators import coco_evaluator_of, evaluators_of
from region_pretrain.data.inspection import prepare_labels
from region_pretrain.data.other_labels import check_other_heads
from region_pretrain.engine.labelled_data import check_labelled_data
from region_pretrain.errors import UserError
from region_pretrain.overrides import apply_overrides
from region_pretrain.yacs.build import build_evaluator, check_packages

MASK_RCNN = "detection/mask_rcnn_r18_fpn_shapes.py"


class OwnCOCO(COCOEvaluator):
    """As a user derives one, to log more."""


class OwnVOC(PascalVOCDetectionEvaluator):
    """The same of VOC's."""


class OwnLVIS(LVISEvaluator):
    """Needs what LVISEvaluator needs."""


def several(*lazy):
    return list(lazy)


def group(*lazy):
    return L(DatasetEvaluators)(evaluators=list(lazy))


@pytest.fixture
def registered(write_coco, request):
    """Registers a json that a function changes; returns its name."""
    name = f"evaluated {request.node.name}"

    def register(change):
        register_coco_instances(name, {}, *write_coco(change))
        return name

    yield register
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def perfect_ap(evaluator, name):
    """Box AP of detections that equal the labels."""
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        output = Instances((record["height"], record["width"]))
        output.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        output.scores = torch.ones(len(boxes))
        output.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        evaluator.process([record], [{"instances": output}])
    return evaluator.evaluate()["bbox"]["AP"]


def one_id(data):
    for annotation in data["annotations"]:
        annotation["id"] = 1


def nothing_that_is_computed(data):
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"]


@pytest.mark.parametrize("change", [one_id, nothing_that_is_computed])
@pytest.mark.parametrize("kind", [COCOEvaluator, OwnCOCO, build_evaluator])
@pytest.mark.parametrize("given", [lambda lazy: lazy, several, group])
def test_every_coco_evaluator_reads_the_fixed_json(registered, tmp_path, change, kind, given):
    name = registered(change)
    cfg = get_config(MASK_RCNN)
    cfg.dataloader.test.dataset.names = name
    options = {"tasks": ["bbox"], "output_dir": str(tmp_path / "out")}
    cfg.dataloader.evaluator = given(L(kind)(dataset_name=name, **options))
    prepare_labels(cfg, {"train": [name], "test": [name]})
    (found,) = evaluators_of(cfg)
    evaluator = instantiate(found.lazy)
    assert type(evaluator) is (COCOEvaluator if kind is build_evaluator else kind)
    assert perfect_ap(evaluator, name) == pytest.approx(100)


@pytest.mark.parametrize("kind", [PascalVOCDetectionEvaluator, OwnVOC])
@pytest.mark.parametrize("given", [lambda lazy: lazy, several, group])
def test_every_voc_evaluator_has_its_files_checked(tmp_path, kind, given):
    root = make_voc(tmp_path / "mine", ["weed", "crop"], {"val": [0, 1]})
    (root / "ImageSets/Main/val.txt").write_text("000000\n\n000001\n")
    name = f"voc://{root}?split=val"
    sources.register(name)
    cfg = get_config("detection/faster_rcnn_r50_c4_voc.py")
    cfg.dataloader.evaluator = given(L(kind)(dataset_name=name))
    with pytest.raises(UserError, match=r"val\.txt: line 2 is empty"):
        prepare_labels(cfg, {"test": [name]})


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("ImageSets/Main/val.txt", "000001\n", "\n000001\n", r"val\.txt: line 2 is empty"),
        (
            "Annotations/000001.xml",
            "<difficult>0</difficult>",
            "",
            r"000001\.xml cannot be evaluated with VOC's metric",
        ),
    ],
)
def test_the_voc_files_of_a_yacs_config_are_checked(tmp_path, file, old, new, message):
    root = make_voc(tmp_path / "mine", ["weed", "crop"], {"val": [0, 1], "train": [2, 3]})
    (root / file).write_text((root / file).read_text().replace(old, new))
    sets = [f"DATASETS.{s.upper()}=('voc://{root}?split={s}',)" for s in ("train", "val")]
    sets[1] = sets[1].replace("VAL", "TEST")
    cfg = load_config("PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml", sets)
    with pytest.raises(UserError, match=message):
        check_labelled_data(cfg, training=True)


def test_masks_are_needed_if_one_of_the_evaluators_needs_them(registered):
    name = registered(lambda data: data["annotations"][2].pop("segmentation"))
    cfg = get_config(MASK_RCNN)
    boxes = L(COCOEvaluator)(dataset_name=name, tasks=["bbox"])
    cfg.dataloader.evaluator = several(boxes, L(OwnCOCO)(dataset_name=name))
    key = "dataloader.evaluator.1"
    with pytest.raises(UserError, match=rf"1 of 6 boxes.*boxes only, add \+{key}.tasks=\[bbox\]"):
        prepare_labels(cfg, {"test": [name]})
    apply_overrides(cfg, [f"+{key}.tasks=[bbox]"])
    assert coco_evaluator_of(cfg, name, "segm") is None
    assert coco_evaluator_of(cfg, name, "bbox") == "dataloader.evaluator.0"
    prepare_labels(cfg, {"test": [name]})


def test_sigmas_are_compared_in_a_list_too(registered):
    name = registered(lambda data: None)
    cfg = get_config("detection/keypoint_rcnn_r50_fpn.py")
    cfg.model.roi_heads.keypoint_head.num_keypoints = 3
    first, second = (L(COCOEvaluator)(dataset_name=name, kpt_oks_sigmas=[0.05] * n) for n in (3, 2))
    cfg.dataloader.evaluator = several(first, second)
    message = r"predicts 3 keypoints, but dataloader.evaluator.1.kpt_oks_sigmas gives .* for 2:"
    with pytest.raises(UserError, match=message):
        check_other_heads(cfg, [name])


def test_other_evaluators_and_functions_are_left_alone(registered):
    name = registered(nothing_that_is_computed)
    json_file = MetadataCatalog.get(name).json_file
    cfg = get_config(MASK_RCNN)
    cfg.dataloader.evaluator = several(L(SemSegEvaluator)(dataset_name=name), L(json.loads)(s="1"))
    prepare_labels(cfg, {"test": [name]})
    assert MetadataCatalog.get(name).json_file == json_file


def test_derived_evaluators_need_the_same_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="OwnLVIS, which needs the package lvis"):
        check_packages("x", [OwnLVIS])
    check_packages("x", [OwnCOCO, json.loads])
