"""Detectors with and without a mask head on boxes with all, some and no masks."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from region_pretrain.config import get_config, load_config
from region_pretrain.data.coco_json import mend_registered
from region_pretrain.data.masks import MaskCount, check_masks
from region_pretrain.engine.detection_data import detection_training_data
from region_pretrain.engine.finetune import do_train
from region_pretrain.errors import UserError

SQUARE = [[10, 10, 40, 10, 40, 40, 10, 40]]


def rle():
    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[10:40, 10:40] = 1
    return mask_util.encode(mask)


def records(*masks):
    """One image per mask, with one box."""
    found = []
    for i, mask in enumerate(masks):
        annotation = {"bbox": [10, 10, 40, 40], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}
        if mask is not None:
            annotation["segmentation"] = mask
        found.append({"file_name": f"{i}.png", "image_id": i, "annotations": [annotation]})
    return found


def detector(name="mask_rcnn_r18_fpn_shapes"):
    cfg = get_config(f"detection/{name}.py")
    cfg.train.max_iter = 7  # like a user's override
    return cfg


def test_count():
    given = records(SQUARE, rle(), None, [], [[]], np.ones((4, 4)))
    given.append({"file_name": "unlabelled.png"})
    given += records([])
    given[-1]["annotations"][0]["iscrowd"] = 1
    count = MaskCount.of(given)
    assert (count.polygons, count.bitmaps, count.without, count.boxes) == (1, 2, 3, 6)
    assert (count.images, count.example) == (3, "2.png")
    assert MaskCount.of(given, crowd=True).without == 4


@pytest.mark.parametrize(
    ("masks", "text"),
    [((None, None), "2 of 2 boxes have no mask"), ((SQUARE, []), "1 of 2 boxes have no mask")],
)
def test_a_mask_head_without_masks_is_told_what_to_override(masks, text):
    with pytest.raises(UserError) as error:
        check_masks(records(*masks), detector())
    message = str(error.value)
    assert text in message and "model.roi_heads.mask_head learns masks" in message
    assert "use one of configs/detection/faster_rcnn_*.py, or override" in message
    # The overrides work.
    cfg = detector()
    for override in message.split(" override ")[1].split():
        key, _, value = override.partition("=")
        node, _, leaf = key.rpartition(".")
        section = cfg
        for part in node.split("."):
            section = section[part]
        section[leaf] = {"null": None, "False": False}[value]
    check_masks(records(*masks), cfg)
    with torch.device("meta"):
        assert not instantiate(cfg.model).roi_heads.mask_on


@pytest.mark.parametrize("head", ["", "ROI_HEADS.NAME=CascadeROIHeads"])
def test_a_mask_head_of_a_yacs_config(head):
    zoo = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    more = [f"MODEL.{head}", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG=True"] if head else []
    with pytest.raises(UserError) as error:
        check_masks(records(None, SQUARE), load_config(zoo, more))
    mend = str(error.value).split("model.cfg.MODEL.MASK_ON learns masks: override ")[1].split()
    cfg = load_config(zoo, [*more, *mend])
    check_masks(records(None, SQUARE), cfg)
    cfg.model.cfg.MODEL.DEVICE = "cpu"
    assert not instantiate(cfg.model).roi_heads.mask_on
    assert not cfg.model.cfg.MODEL.MASK_ON and not cfg.dataloader.train.mapper.use_instance_mask


def mapper_after(masks, cfg):
    check_masks(records(*masks), cfg)
    mapper = cfg.dataloader.train.mapper
    return mapper.use_instance_mask, mapper.get("instance_mask_format", "polygon")


def test_the_format_of_masks_is_chosen(caplog):
    caplog.set_level("INFO")
    assert mapper_after((SQUARE, SQUARE), detector()) == (True, "polygon")
    assert not caplog.text
    assert mapper_after((SQUARE, rle()), detector()) == (True, "bitmask")
    assert "instance_mask_format=bitmask: 1 of 2 masks are RLE" in caplog.text
    cfg = detector()
    cfg.dataloader.train.mapper.instance_mask_format = "polygon"
    assert mapper_after((rle(),), cfg) == (True, "bitmask")


def test_without_a_mask_head_anything_is_accepted():
    def boxes_only():
        cfg = detector("faster_rcnn_r18_fpn_shapes")
        cfg.dataloader.train.mapper.update(use_instance_mask=True, instance_mask_format="polygon")
        return cfg

    assert mapper_after((SQUARE, SQUARE), boxes_only()) == (True, "polygon")
    assert mapper_after((rle(), SQUARE), boxes_only()) == (True, "bitmask")
    assert mapper_after((SQUARE, []), boxes_only()) == (False, "polygon")
    assert mapper_after((None,), boxes_only()) == (False, "polygon")
    cropped = boxes_only()
    cropped.dataloader.train.mapper.recompute_boxes = True  # needs the masks
    assert mapper_after((SQUARE, []), cropped) == (True, "polygon")


@pytest.fixture
def data_set(tmp_path, monkeypatch, request):
    """Register four images of 64 pixels; ``data_set(mask, ...)`` gives their boxes these masks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = []

    def register(*masks):
        images, annotations = [], []
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64})
            annotations.append({"image_id": i + 1, "category_id": 1, "bbox": [10, 10, 30, 30]})
            if (mask := masks[i % len(masks)]) is not None:
                annotations[-1]["segmentation"] = mask
        categories = [{"id": 1, "name": "thing"}]
        data = {"images": images, "annotations": annotations, "categories": categories}
        names.append(f"{request.node.name} {len(names)}")
        path = tmp_path / f"{len(names)}.json"
        path.write_text(json.dumps(data))
        register_coco_instances(names[-1], {}, str(path), str(tmp_path))
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def small(cfg, name, folder):
    cfg.model.roi_heads.num_classes = 1
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    cfg.dataloader.train.dataset.names = cfg.dataloader.test.dataset.names = name
    cfg.dataloader.train.update(total_batch_size=2, num_workers=0)
    cfg.train.update(max_iter=2, eval_period=2, log_period=1, output_dir=str(folder), seed=1)
    cfg.train.device = "cpu"
    return cfg


def text_rle():
    mask = rle()
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def test_faster_rcnn_on_boxes_only_trains_and_evaluates(tmp_path, data_set):
    name = data_set(None, [])
    cfg = small(get_config("detection/faster_rcnn_r18_fpn_shapes.py"), name, tmp_path / "out")
    results = do_train(cfg)
    assert set(results) == {"bbox"} and 0 <= results["bbox"]["AP"] <= 100
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"{name}: 4 images, 4 boxes (thing 4)" in log
    assert f"{name}: 4 x no area; computed from the mask or the box (e.g. annotation" in log


def test_mask_rcnn_trains_on_polygons_and_rle(tmp_path, data_set):
    name = data_set(SQUARE, text_rle())
    cfg = small(get_config("detection/mask_rcnn_r18_fpn_shapes.py"), name, tmp_path / "out")
    results = do_train(cfg)
    assert set(results) == {"bbox", "segm"} and 0 <= results["segm"]["AP"] <= 100
    assert "instance_mask_format=bitmask: 2 of 4 masks" in (tmp_path / "out/log.txt").read_text()


def test_bitmaps_of_polygons_are_the_same_masks(tmp_path, data_set):
    def masks(name):
        cfg = small(get_config("detection/mask_rcnn_r18_fpn_shapes.py"), name, tmp_path)
        data = detection_training_data(cfg.dataloader.train, 0)
        (batch,) = data.iterate(0, 1)
        return [image["instances"].gt_masks.tensor for image in batch]

    mixed = data_set(SQUARE, text_rle())
    mend_registered(mixed)
    for mask in masks(mixed):
        assert mask.sum() == 900


def test_mask_ap_without_masks_is_refused_before_the_training(tmp_path, data_set):
    full, part = data_set(SQUARE), data_set(SQUARE, None)

    def config():
        cfg = small(get_config("detection/mask_rcnn_r18_fpn_shapes.py"), full, tmp_path / "out")
        cfg.dataloader.test.dataset.names = part
        return cfg

    with pytest.raises(UserError, match="2 of 4 boxes have no mask.*mask AP.*tasks=.bbox."):
        do_train(config())
    assert not (tmp_path / "out").exists()
    cfg = config()
    cfg.dataloader.evaluator.tasks = ["bbox"]
    assert set(do_train(cfg)) == {"bbox"}
