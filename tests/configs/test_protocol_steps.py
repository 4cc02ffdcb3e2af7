"""Fine-tuning protocols train and evaluate: narrow detectors, small files of the real format."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_lvis_instances
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic_separated
from detectron2.data.datasets.lvis import get_lvis_instances_meta
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from detectron2.layers import ShapeSpec
from zoo import register_coco

from region_pretrain.config import get_config
from region_pretrain.engine.detection_data import check_image_files
from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.labelled_data import check_labelled_data
from region_pretrain.errors import UserError
from region_pretrain.modeling.narrow_resnet import narrow_resnet18_stages

WIDTH = 64  # of the FPN; FCOS has 32 groups per norm
RPN = {"loss_rpn_cls", "loss_rpn_loc"}
RCNN = RPN | {"loss_cls", "loss_box_reg"}
CASCADE = {f"loss_{what}_stage{i}" for what in ("cls", "box_reg") for i in range(3)}


def shape(side: int | None = None, channels: int = WIDTH) -> ShapeSpec:
    return ShapeSpec(channels=channels, height=side, width=side)


def narrow(model) -> None:
    """Thin layers, few proposals."""
    trunk = model.backbone.bottom_up
    trunk.stem.out_channels = 8
    trunk.stages = L(narrow_resnet18_stages)(channels=8, norm="SyncBN")
    model.backbone.out_channels = WIDTH
    if "head" in model:
        top = model.backbone.top_block
        top.in_channels = WIDTH if top.get("in_feature") == "p5" else 64
        model.head.update(input_shape=[shape()] * 5, conv_dims=[WIDTH])
        model.test_score_thresh = 0.0
        return
    model.proposal_generator.head.in_channels = WIDTH
    model.proposal_generator.post_nms_topk = (50, 20)
    heads = model.roi_heads
    heads.batch_size_per_image = 16
    for head in heads.get("box_heads") or [heads.box_head]:
        head.update(input_shape=shape(7), fc_dims=[24], conv_dims=[WIDTH] * len(head.conv_dims))
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        predictor.input_shape = shape(channels=24)
    if heads.get("mask_head"):
        heads.mask_head.update(input_shape=shape(14), conv_dims=[8, 8])
    if heads.get("keypoint_head"):
        heads.keypoint_head.update(input_shape=shape(14), conv_dims=[8])


def small(name: str, train: str, test: str, folder: Path):
    """A protocol on other data, for one step."""
    cfg = get_config(f"detection/{name}")
    narrow(cfg.model)
    for loader, names in ((cfg.dataloader.train, train), (cfg.dataloader.test, test)):
        loader.dataset.names = names
        loader.num_workers = 0
        loader.mapper.augmentations[0].update(short_edge_length=64, max_size=80)
    cfg.dataloader.train.total_batch_size = 2
    owner = cfg.model if "head" in cfg.model else cfg.model.roi_heads
    owner.num_classes = None  # follows the data
    cfg.train.update(output_dir=str(folder / "run"), max_iter=1, device="cpu", log_period=1)
    cfg.train.precise_bn = {"enabled": False}
    cfg.lr_multiplier.update(max_iter=24_000, steps=[18_000])
    return cfg


def run(cfg) -> tuple[dict, dict]:
    """Results, and the losses of the only step."""
    results = do_train(cfg)
    lines = (Path(cfg.train.output_dir) / "metrics.json").read_text().splitlines()
    metrics = {k: v for line in lines for k, v in json.loads(line).items()}
    losses = {k: v for k, v in metrics.items() if k.startswith("loss_")}
    assert all(np.isfinite(v) and v > 0 for v in losses.values())
    assert metrics["total_loss"] == pytest.approx(sum(losses.values()), rel=1e-5)
    return results, losses


@pytest.fixture
def coco(tmp_path) -> str:
    (tmp_path / "coco").mkdir()
    name = register_coco(f"protocols of {tmp_path}", tmp_path / "coco")
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(name)


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("retinanet_r50_fpn.py", {"loss_cls", "loss_box_reg"}),
        ("fcos_r50_fpn.py", {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}),
        (
            "cascade_mask_rcnn_r50_fpn.py",
            RPN | {"loss_mask"} | CASCADE,
        ),
    ],
)
def test_coco(name, losses, coco, tmp_path):
    results, found = run(small(name, coco, coco, tmp_path))
    assert set(found) == losses
    assert results["bbox"].keys() >= {"AP", "AP50", "AP-a", "AP-b", "AP-c"}
    assert ("segm" in results) == ("mask" in name)


def test_keypoints_are_evaluated_by_oks(coco, tmp_path):
    cfg = small("keypoint_rcnn_r50_fpn.py", coco, coco, tmp_path)
    cfg.model.roi_heads.keypoint_head.num_keypoints = 3
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.026, 0.035, 0.035]
    results, losses = run(cfg)
    assert set(losses) == RCNN | {"loss_keypoint"}
    assert set(results) == {"bbox", "keypoints"}
    assert 0 <= results["keypoints"]["AP"] <= 100


def test_keypoints_of_a_json_by_path(coco, tmp_path):
    """The json names the keypoints; it lacks what only pycocotools needs."""
    path = tmp_path / "coco" / "coco.json"
    data = json.loads(path.read_text())
    for annotation in data["annotations"]:
        del annotation["num_keypoints"]
    path.write_text(json.dumps(data))
    name = f"coco://{path}?images={tmp_path / 'coco'}"
    cfg = small("keypoint_rcnn_r50_fpn.py", name, name, tmp_path)
    cfg.model.roi_heads.keypoint_head.num_keypoints = 3
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.026, 0.035, 0.035]
    results, _ = run(cfg)
    assert 0 <= results["keypoints"]["AP"] <= 100
    # nose, left ear, right ear
    assert list(instantiate(cfg.dataloader.train.mapper).keypoint_hflip_indices) == [0, 2, 1]
    assert "no num_keypoints; counted" in (tmp_path / "run" / "log.txt").read_text()


def test_keypoints_without_names_are_refused(coco, tmp_path):
    """Many converters write none."""
    path = Path(MetadataCatalog.get(coco).json_file)
    data = json.loads(path.read_text())
    for category in data["categories"]:
        del category["keypoints"]
    (tmp_path / "bare.json").write_text(json.dumps(data))
    name = f"coco://{tmp_path / 'bare.json'}?images={MetadataCatalog.get(coco).image_root}"
    cfg = small("keypoint_rcnn_r50_fpn.py", name, name, tmp_path / "run")
    cfg.model.roi_heads.keypoint_head.num_keypoints = 3
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.1] * 3
    with pytest.raises(UserError, match=r"bare.json.* has no names of keypoints.*\"keypoints\""):
        do_train(cfg)


def test_keypoints_of_the_data_the_detector_and_the_evaluator_agree(coco, tmp_path):
    cfg = small("keypoint_rcnn_r50_fpn.py", coco, coco, tmp_path)
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.05] * 17
    with pytest.raises(UserError, match=r"0\.png has a box with 3 keypoints, but .*points=17: all"):
        do_train(cfg)
    cfg.model.roi_heads.keypoint_head.num_keypoints = 3
    cfg.dataloader.evaluator.kpt_oks_sigmas = []
    with pytest.raises(UserError, match="3 keypoints, but dataloader.evaluator.kpt_oks_sigmas giv"):
        do_train(cfg)


@pytest.fixture
def panoptic(coco, tmp_path) -> str:
    """COCO's "separated" panoptic format: a json of instances, and maps of 2 stuff classes."""
    images, maps = tmp_path / "images", tmp_path / "maps"
    images.mkdir(), maps.mkdir()
    data = json.loads((tmp_path / "coco" / "coco.json").read_text())
    for image in data["images"]:
        file = image["file_name"].replace("png", "jpg")
        cv2.imwrite(str(images / file), cv2.imread(str(tmp_path / "coco" / image["file_name"])))
        image["file_name"] = file
        labels = np.full((image["height"], image["width"]), 255, np.uint8)  # 255: ignored
        labels[:20], labels[20:40] = 1, 0  # a stuff class; all things are class 0
        cv2.imwrite(str(maps / file.replace("jpg", "png")), labels)
    (tmp_path / "instances.json").write_text(json.dumps(data))
    meta = {
        "stuff_classes": ["things", "sky"],
        "stuff_dataset_id_to_contiguous_id": {0: 0, 9: 1},
        "thing_classes": ["a", "b", "c"],
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1, 3: 2},
    }
    name = f"panoptic of {tmp_path}"
    register_coco_panoptic_separated(
        name, meta, str(images), "", "", str(maps), str(tmp_path / "instances.json")
    )
    yield f"{name}_separated"
    for end in ("_separated", "_stuffonly"):
        DatasetCatalog.remove(name + end)
        MetadataCatalog.remove(name + end)


def test_panoptic(panoptic, tmp_path):
    cfg = small("panoptic_fpn_r50.py", panoptic, panoptic, tmp_path)
    with pytest.raises(UserError, match="COCOPanopticEvaluator, which needs the package pan"):
        do_train(cfg)
    # Without that package, the other two of its three evaluators.
    cfg.dataloader.evaluator = [
        L(kind)(dataset_name=panoptic) for kind in (COCOEvaluator, SemSegEvaluator)
    ]
    message = "model.sem_seg_head.num_classes=54, but .* has 2 stuff_classes: set .*=2$"
    with pytest.raises(UserError, match=message):
        do_train(cfg)
    cfg.model.sem_seg_head.update(num_classes=2, conv_dims=WIDTH)
    results, losses = run(cfg)
    assert set(losses) == RCNN | {"loss_mask", "loss_sem_seg"}
    assert results["sem_seg"].keys() >= {"mIoU", "IoU-sky"}
    assert 0 <= results["sem_seg"]["mIoU"] <= 100 and "AP" in results["segm"]


def test_panoptic_without_maps(coco, panoptic, tmp_path):
    cfg = small("panoptic_fpn_r50.py", coco, panoptic, tmp_path)
    del cfg.dataloader.evaluator
    with pytest.raises(UserError, match="6 of 6 images have no segmentation map .*0.png"):
        do_train(cfg)
    records = DatasetCatalog.get(panoptic)
    (tmp_path / "maps" / "3.png").unlink()
    with pytest.raises(UserError, match=r"x: 1 of 12 files do not exist, e.g. .*maps/3.png"):
        check_image_files(records, "x")


@pytest.fixture
def lvis(coco, tmp_path, monkeypatch) -> str:
    """LVIS's format, read through what Detectron2's loader uses of the package ``lvis``."""

    class Api:
        def __init__(self, path):
            data = json.loads(Path(path).read_text())
            self.imgs = {image["id"]: image for image in data["images"]}
            self.img_ann_map = {i: [] for i in self.imgs}
            for annotation in data["annotations"]:
                self.img_ann_map[annotation["image_id"]].append(annotation)

        def load_imgs(self, ids):
            return [self.imgs[i] for i in ids]

    package = ModuleType("lvis")
    package.LVIS, package.__spec__ = Api, ModuleSpec("lvis", None)
    monkeypatch.setitem(sys.modules, "lvis", package)
    data = json.loads((tmp_path / "coco" / "coco.json").read_text())
    for image in data["images"]:
        image["coco_url"] = f"http://host/coco/{image.pop('file_name')}"
        image.update(neg_category_ids=[1], not_exhaustive_category_ids=[2])
    for annotation in data["annotations"]:
        annotation.pop("iscrowd")  # LVIS has no crowds
        annotation["category_id"] = 1 if annotation["image_id"] < 5 else 2
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    name = f"lvis_v1_test of {tmp_path}"  # Detectron2 knows the classes of lvis_v1
    meta = get_lvis_instances_meta(name)
    register_lvis_instances(name, meta, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(name)


@pytest.mark.parametrize(
    "config", ["mask_rcnn_r50_fpn_lvis.py", "mask_rcnn_r50_fpn_4conv1fc_wd2.5e-5_lvis.py"]
)
def test_lvis(config, lvis, tmp_path):
    cfg = small(config, lvis, lvis, tmp_path)
    del cfg.dataloader.evaluator
    results, losses = run(cfg)
    assert results == {} and set(losses) == RCNN | {"loss_mask"}
    predictor = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert len(predictor["roi_heads.box_predictor.cls_score.weight"]) == 1_204
    # Classes in 5 and 1 of 6 images, with threshold 0.6: sqrt(0.6 / (1 / 6)) for the rare one.
    cfg.dataloader.train.sampler.repeat_factors.repeat_thresh = 0.6
    sampler = instantiate(cfg.dataloader.train.sampler)
    factors = (sampler._int_part + sampler._frac_part).tolist()
    assert factors == pytest.approx([1.0] * 5 + [3.6**0.5])


def test_cityscapes(coco, tmp_path):
    config = "mask_rcnn_r50_fpn_cityscapes.py"
    with pytest.raises(UserError, match="InstanceEvaluator, which needs the package cityscapessc"):
        check_labelled_data(get_config(f"detection/{config}"), training=True)
    results, losses = run(small(config, coco, coco, tmp_path))
    assert set(losses) == RCNN | {"loss_mask"} and "AP" in results["segm"]


def test_a_missing_package_of_a_loader_is_one_line(lvis, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)
    cfg = small("mask_rcnn_r50_fpn_lvis.py", lvis, lvis, tmp_path)
    del cfg.dataloader.evaluator
    with pytest.raises(UserError, match="^the data set cannot be read: .*lvis.*: install this"):
        do_train(cfg)


def test_voc(tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 256, (64, 80, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"VOC2007/JPEGImages/00{i}.jpg"), image)
        (tmp_path / f"VOC2007/Annotations/00{i}.xml").write_text(
            "<annotation><size><width>80</width><height>64</height></size><object><name>dog</name>"
            "<pose>Left</pose><truncated>0</truncated>"
            "<difficult>0</difficult><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>40</xmax>"
            "<ymax>44</ymax></bndbox></object></annotation>"
        )
    (tmp_path / "VOC2007/ImageSets/Main/all.txt").write_text("000\n001\n002\n")
    name = f"voc://{tmp_path}/VOC2007?split=all"
    results, losses = run(small("faster_rcnn_r50_fpn_voc.py", name, name, tmp_path))
    assert set(losses) == RCNN and set(results["bbox"]) == {"AP", "AP50", "AP75"}
