"""A detector's boxes as regions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from narrow_detector import detector_config, save
from omegaconf import OmegaConf
from PIL import Image

from region_pretrain.engine.detector_regions import DetectorBoxes
from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore, generate
from region_pretrain.regions.elsewhere import DetectorRecipe
from region_pretrain.regions.elsewhere.matching import GIVEN
from region_pretrain.regions.generate import make_regions


@pytest.fixture
def records(tmp_path):
    (tmp_path / "images").mkdir()
    rng, found = np.random.default_rng(0), []
    for i in range(5):
        pixels = rng.integers(0, 256, (60 + 8 * i, 100, 3), np.uint8)
        path = tmp_path / "images" / f"{i}.png"
        Image.fromarray(pixels).save(path)
        found.append({"file_name": str(path), "image_id": f"{i}.png"})
    return found


def model_config():
    model = detector_config()
    third, fourth = model.backbone.bottom_up.stages[2:]  # a basic block of stride 2 must widen
    third.out_channels = fourth.in_channels = 24
    return model


def narrow_model():
    torch.manual_seed(0)
    return instantiate(model_config()).eval()


@pytest.fixture
def detector(tmp_path):
    """The files of a config and its weights."""
    mapper = L(DatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=200)],
        image_format="BGR",
    )
    cfg = OmegaConf.create(
        {"model": model_config(), "dataloader": {"test": {"mapper": mapper}}},
        flags={"allow_objects": True},
    )
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    return str(tmp_path / "config.yaml"), save(tmp_path, {"model": narrow_model().state_dict()})


def as_input(record, size=64):
    """What Detectron2's own mapper returns, with the size of the original image."""
    augmentations = [T.ResizeShortestEdge(short_edge_length=size, max_size=200)]
    mapper = DatasetMapper(is_train=False, augmentations=augmentations, image_format="BGR")
    width, height = Image.open(record["file_name"]).size
    return {**mapper({**record, "width": width, "height": height}), "size": (width, height)}


def test_proposals_are_those_of_the_detector_in_pixels_of_the_image(records, detector):
    boxes = DetectorBoxes(*detector, batch_size=2, device="cpu")
    found = list(boxes(records))
    assert [record["image_id"] for record in found] == [f"{i}.png" for i in range(5)]
    model = narrow_model()
    for pair in (records[:2], records[2:4], records[4:]):
        inputs = [as_input(record) for record in pair]
        with torch.no_grad():
            images = model.preprocess_image(inputs)
            proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
        for record, given, found_here in zip(pair, inputs, proposals, strict=True):
            mine = next(r for r in found if r["image_id"] == record["image_id"])[GIVEN]
            (width, height), (_, h, w) = given["size"], given["image"].shape
            expected = found_here.proposal_boxes.tensor * torch.tensor([width / w, height / h] * 2)
            assert mine.size == (width, height)
            np.testing.assert_allclose(mine.boxes, expected, atol=1e-3)
            scores = 1 / (1 + np.exp(-found_here.objectness_logits.double().numpy()))
            np.testing.assert_allclose(mine.scores, scores, atol=1e-6)
            assert (np.diff(mine.scores) <= 0).all() and len(mine.scores) > 20


def test_a_config_whose_values_refer_to_each_other(records, detector):
    cfg = LazyConfig.load("configs/detection/mask_rcnn_r18_fpn_shapes.py")
    assert "${" in OmegaConf.to_yaml(cfg.dataloader.test.mapper)
    cfg.model = model_config()
    LazyConfig.save(cfg, detector[0])
    boxes = DetectorBoxes(*detector, device="cpu")
    assert len(boxes.digest) == 16 and len(list(boxes(records))) == len(records)
    cfg.dataloader.train.mapper.image_format = "BGR"  # which the test mapper refers to
    LazyConfig.save(cfg, detector[0])
    assert DetectorBoxes(*detector, device="cpu").digest != boxes.digest


def test_a_store_resumes_without_detecting_again(records, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "_PROGRESS_SECONDS", 0)
    boxes = DetectorBoxes(*detector, batch_size=2, device="cpu")
    recipe = DetectorRecipe("detector-v1", source=boxes.digest, top=7)
    (tmp_path / "broken.png").write_bytes(b"no image")
    records.insert(1, {"file_name": str(tmp_path / "broken.png"), "image_id": "broken"})
    made, out = [], str(tmp_path / "r.arrow")

    def until(stop):
        def prepare(some):
            for record in boxes(some):
                if len(made) == stop:
                    raise KeyboardInterrupt
                made.append(record["image_id"])
                yield record

        return prepare

    run = dict(out=out, recipe=recipe, workers=1, part_size=2, max_unreadable=0.5)
    with pytest.raises(KeyboardInterrupt):
        make_regions(records, prepare=until(3), **run)
    progress = json.loads((tmp_path / "r.arrow.parts/progress-0.json").read_text())
    assert (progress["done"], progress["total"]) == (3, 6)
    summary = make_regions(records, prepare=until(99), **run)
    assert made == ["0.png", "broken", "1.png", "1.png", "2.png", "3.png", "4.png"]
    assert (summary["images"], summary["unreadable"], summary["max"]) == (5, 1, 7)
    store = RegionStore.open(out)
    assert store.manifest["recipe"] == f"detector-v1+source={boxes.digest}+top=7"
    direct = {r["image_id"]: r for r in boxes(records)}
    best = direct["3.png"][GIVEN].boxes[0]
    np.testing.assert_array_equal(store.boxes("3.png")[0], best.clip(0, (100, 84, 100, 84)))


def test_final_detections_of_a_yacs_config(records, tmp_path):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("two", "sets")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = "GeneralizedRCNN", "StandardROIHeads"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.update({"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "NORM": "BN"})
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.update({"NUM_CLASSES": 2, "SCORE_THRESH_TEST": 0.01})
    cfg.MODEL.ROI_BOX_HEAD.update({"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16})
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 48, 200
    (tmp_path / "faster_rcnn.yaml").write_text(cfg.dump())
    torch.manual_seed(1)
    model = build_model(cfg).eval()
    weights = save(tmp_path, {"model": model.state_dict()})
    config = str(tmp_path / "faster_rcnn.yaml")
    boxes = DetectorBoxes(config, weights, detections=True, device="cpu")
    for record in boxes(records[:2]):
        with torch.no_grad():
            (output,) = model([as_input(record, 48)])
        instances = output["instances"]
        assert len(instances) > 5
        np.testing.assert_allclose(record[GIVEN].boxes, instances.pred_boxes.tensor, atol=1e-3)
        np.testing.assert_allclose(record[GIVEN].scores, instances.scores, atol=1e-5)


def test_refusals(records, detector, tmp_path):
    config, weights = detector
    state = torch.load(weights, weights_only=True)["model"]
    backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
    only = save(tmp_path, {"model": backbone}, "backbone.pth")
    with pytest.raises(UserError, match="backbone.pth has no weights for proposal_generator: "):
        DetectorBoxes(config, only, device="cpu")
    without_heads = {k: v for k, v in state.items() if not k.startswith("roi_heads.")}
    rpn = save(tmp_path, {"model": without_heads}, "rpn.pth")
    assert not DetectorBoxes(config, rpn, device="cpu").detections
    with pytest.raises(UserError, match="rpn.pth has no weights for roi_heads.box_head"):
        DetectorBoxes(config, rpn, detections=True, device="cpu")
    with pytest.raises(UserError, match="--batch-size 0"):
        DetectorBoxes(config, weights, batch_size=0)
    LazyConfig.save(OmegaConf.create({"model": {"a": 1}}), str(tmp_path / "c.yaml"))
    with pytest.raises(UserError, match="c.yaml has no dataloader.test.mapper"):
        DetectorBoxes(str(tmp_path / "c.yaml"), weights)
