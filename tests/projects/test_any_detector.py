"""Every method around every kind of detector: one step, then back into the detector."""

import copy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling.backbone import Backbone
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.engine.checkpoint import split_state
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.modeling.momentum import MomentumCopy

sys.path.insert(0, str(Path(__file__).parent))
from narrow_detectors import DETECTORS

PROJECTS = CONFIG_ROOT.parent / "projects"
METHODS = {
    "SoCo": "SoCo/configs/common/soco.py",
    "CCOP": "CCOP/configs/common/ccop.py",
    "MCL": "MCL/configs/common/mcl.py",
    "point-level": "PointRegionContrast/configs/common/point_region.py",
    "MoCo v2": "MoCo/configs/common/moco.py",
    "BYOL": "BYOL/configs/common/byol.py",
}
TRUNK, PYRAMID, HEAD, TOWERS, RES5 = "trunk", "pyramid", "box head", "towers", "res5"
ALL = (TRUNK, PYRAMID, HEAD)
#: What each method fills of a detector, or the error.
FPN = {
    "SoCo": ALL,
    "CCOP": (TRUNK, PYRAMID),
    "MCL": ALL,
    "point-level": (TRUNK, PYRAMID),
    "MoCo v2": (TRUNK,),
    "BYOL": (TRUNK,),
}
ONE_STAGE = FPN | {"SoCo": (TRUNK, PYRAMID, TOWERS), "MCL": (TRUNK, PYRAMID, TOWERS)}
NO_PYRAMID = {
    "CCOP": "no feature pyramid, which CCOP trains: use soco, point_region, moco or byol",
    "MCL": "lacks a feature pyramid .* MCL trains both: use soco, point_region, moco or byol",
}
WITH_RES5 = dict.fromkeys(FPN, (TRUNK, RES5)) | NO_PYRAMID
ONE_MAP = FPN | {"SoCo": (TRUNK, HEAD), "point-level": (TRUNK,)} | NO_PYRAMID
#: MCL trains the convolutions of a box head that has some, so its fc layers are not filled.
CONVOLUTIONS = FPN | {"MCL": (TRUNK, PYRAMID, "box head's convolutions")}
FILLED = dict.fromkeys(DETECTORS, FPN) | {
    "Mask R-CNN, FPN, convolutions in the box head": CONVOLUTIONS,
    "Cascade R-CNN, FPN, convolutions in the box heads": CONVOLUTIONS,
    "ViTDet": CONVOLUTIONS,
    "timm's ViT, simple pyramid": CONVOLUTIONS,
    "RetinaNet": ONE_STAGE,
    "FCOS": ONE_STAGE,
    "C4": WITH_RES5,
    "DC5": ONE_MAP,
    "plain ViT": ONE_MAP,
}


def recipe(method: str, detector: DictConfig) -> DictConfig:
    path = str(PROJECTS / METHODS[method])
    pretrain, dataloader = LazyConfig.load(path, ("pretrain", "dataloader"))
    model = pretrain(detector)
    cfg = DictConfig(
        {"model": model, "dataloader": dataloader, "train": {"seed": 0}},
        flags={"allow_objects": True},
    )
    for key in (key for key in cfg.model if key.endswith("queue")):
        cfg.model[key].length = 64
    for key in ("head", "projector", "predictor", "image_head", "region_head", "affinity_head"):
        if "hidden_dim" in (cfg.model.get(key) or {}):
            cfg.model[key].hidden_dim = 16
    views = cfg.dataloader.train.dataset.views
    if "sizes" in views:  # 128 pixels instead of 224, which MCL's head is for
        views.sizes = [side * 4 // 7 for side in views.sizes]
    elif "montage" not in views:
        views.size = 128
        if "cells" in views:
            views.cells = 32
    return cfg


def a_batch(cfg: DictConfig, region_folder):
    views = cfg.dataloader.train.dataset.views
    if "montage" in views:  # for 4 images instead of 128
        views.montage.images_per_canvas = [1, 2, 4, 4][: len(views.montage.ratios)]
    dataset = PretrainDataset(
        f"folder://{region_folder.images}", instantiate(views), region_folder.store
    )
    return dataset.batch(0, 0, range(4))


def module_of(name: str) -> str:
    parts = name.split(".")
    if name.startswith("roi_heads.box_head."):
        return (
            "box head's convolutions"
            if parts[-3 if parts[-2] == "norm" else -2][:4] == "conv"
            else HEAD
        )
    if name.startswith("roi_heads.res5."):
        return RES5
    if name.startswith(("head.cls_subnet.", "head.bbox_subnet.")):
        return TOWERS
    if parts[0] != "backbone":
        return parts[0]
    return PYRAMID if parts[1].startswith(("fpn_", "simfp_", "top_block")) else TRUNK


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DETECTORS)
def test_one_step_and_back_into_the_detector(name, method, region_folder, tmp_path):
    lazy, expected = DETECTORS[name](), FILLED[name][method]
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as error:
            recipe(method, copy.deepcopy(lazy))
        assert "\n" not in str(error.value)
        return
    cfg = recipe(method, copy.deepcopy(lazy))
    torch.manual_seed(0)
    model = instantiate(cfg.model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with EventStorage(0):
        model.before_step(0, 10)
        losses = model(a_batch(cfg, region_folder))
        loss = sum(value for key, value in losses.items() if key.startswith("loss"))
        assert torch.isfinite(loss)
        loss.backward()
        copies = {p for m in model.modules() if isinstance(m, MomentumCopy) for p in m.parameters()}
        for key, parameter in model.named_parameters():  # DDP would wait for those without
            assert (parameter.grad is not None) == parameter.requires_grad, key
            assert parameter not in copies or not parameter.requires_grad
        optimizer.step()
        model.after_step(0, 10)

    saved = split_state(model)[0]
    torch.save({"model": saved}, tmp_path / "model_final.pth")
    stock = instantiate(lazy)
    checkpointer, incompatible = DetectionCheckpointer(stock), []
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(str(tmp_path / "model_final.pth"))
    assert not incompatible[0].unexpected_keys and not incompatible[0].incorrect_shapes
    state = stock.state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    total = Counter(map(module_of, state))
    filled = Counter(map(module_of, saved))
    wanted = {"box head's convolutions", *expected} if HEAD in expected else set(expected)
    assert filled == {module: total[module] for module in wanted if total[module]}

    for value in state.values():
        value.zero_()
    report = load_pretrained(stock, str(tmp_path / "model_final.pth"))
    assert set(report.matched) == set(saved) and not report.unexpected
    assert all(torch.equal(state[key], value) for key, value in saved.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_built_detector_is_trained_itself(method, region_folder):
    """The weights are the detector's own, which needs no loading afterwards."""
    detector = instantiate(DETECTORS["Faster/Mask R-CNN, FPN"]()).train()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    package, function = {
        "SoCo": ("soco", "soco"),
        "CCOP": ("ccop", "ccop"),
        "MCL": ("mcl", "mcl"),
        "point-level": ("point_region_contrast", "point_region"),
        "MoCo v2": ("moco", "moco"),
        "BYOL": ("byol", "byol"),
    }[method]
    module = __import__(f"region_pretrain.projects.{package}", fromlist=[function])
    model = getattr(module, function)(detector, dim=16, hidden_dim=16).train()
    cfg = recipe(method, DETECTORS["Faster/Mask R-CNN, FPN"]())
    if method == "SoCo":
        cfg.dataloader.train.dataset.views.update(sizes=[224, 112], sources=["crop"])
    if method == "MCL":
        model.montage.images_per_canvas = [1, 2, 4, 4]
    trained = [p for p in model.parameters() if p.requires_grad]
    with EventStorage(0):
        model.before_step(0, 10)
        losses = model(a_batch(cfg, region_folder))
        sum(v for key, v in losses.items() if key.startswith("loss")).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    moved = {
        module_of(key)
        for key, value in detector.named_parameters()
        if not torch.equal(value, before[key])
    }
    assert moved == set(FPN[method])


def test_backbones_of_every_detector_are_detectron2s():
    with on_meta_device():
        for name, make in DETECTORS.items():
            assert isinstance(instantiate(make().backbone), Backbone), name
