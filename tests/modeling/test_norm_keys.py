"""Norms that cannot be built are reported with their key."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from region_pretrain.engine.build import build_model, build_part
from region_pretrain.engine.methods import load_method
from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "yacs"))
from narrow_detector import detector_config
from zoo import NARROW

FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
UNKNOWN = "model.backbone.norm=nope: must be BN, .*GN, LN, .* or empty"
GROUPS = r"model.backbone.norm=GN: .*num_channels.* set it to LN or BN, or the layer.s channels"


def config(norm: str) -> DictConfig:
    model = detector_config(width=48)
    model.backbone.norm = norm
    train = {"seed": 0, "channels_last": False}
    return DictConfig({"model": model, "train": train}, flags={"allow_objects": True})


@pytest.mark.parametrize(("norm", "message"), [("nope", UNKNOWN), ("GN", GROUPS)])
def test_norms_of_a_config(norm, message):
    cfg = config(norm)
    with pytest.raises(UserError, match=message) as error:
        build_model(cfg, torch.device("cpu"))
    assert isinstance(error.value.__cause__, KeyError | ValueError)
    with pytest.raises(UserError, match=message):
        Detector(cfg)
    with pytest.raises(UserError, match=message):
        load_method("soco", cfg)
    with pytest.raises(UserError, match=message):
        load_method("soco", config("BN"), [f"model.backbone.norm={norm}"])


def test_norms_of_a_yacs_config():
    with pytest.raises(UserError, match="MODEL.RESNETS.NORM=nope: must be BN"):
        load_method("soco", FPN, [*NARROW, "MODEL.RESNETS.NORM=nope"])
    with pytest.raises(UserError, match="MODEL.FPN.NORM=GN|model.backbone.norm=GN"):
        load_method("soco", FPN, [*NARROW, "MODEL.FPN.NORM=GN", "MODEL.FPN.OUT_CHANNELS=48"])


def other(norm: str) -> nn.Module:
    raise KeyError("mode") if norm == "GN" else ValueError("no such thing")


@pytest.mark.parametrize(("norm", "kind"), [("GN", KeyError), ("BN", ValueError)])
def test_other_errors_are_the_developers(norm, kind):
    with pytest.raises(kind):
        build_part(L(other)(norm=norm), "model")
    assert instantiate(L(nn.ReLU)())
