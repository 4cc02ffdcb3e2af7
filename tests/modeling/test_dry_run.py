"""Modules whose code depends on values cannot be built or run on the meta device."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import nn

from region_pretrain.engine.methods import load_method
from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector
from region_pretrain.modeling.dry_run import dry_run
from region_pretrain.modeling.pyramid import freeze_unread

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from narrow_detector import detector_config


class Careful(Backbone):
    """A trunk that looks at its values, and has a random layer and batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        x = self.norm(self.stem(x))
        assert torch.isfinite(x).all()
        if x.std() < 1e-6:
            raise ValueError("an empty image")
        random.random(), np.random.rand(), torch.rand(1)
        return {"a": x, "b": self.last(x)}

    def output_shape(self):
        return {"a": ShapeSpec(channels=8, stride=4), "b": ShapeSpec(channels=8, stride=8)}


class CarefulHead(FastRCNNConvFCHead):
    def __init__(self, input_shape, **arguments):
        super().__init__(input_shape, **arguments)
        self.rates = [r.item() for r in torch.arange(3) / 3]

    def forward(self, x):
        assert torch.isfinite(x).all()
        return super().forward(x)


class Broken(Careful):
    def forward(self, x):
        if x.mean() < 1e9:
            raise KeyError("no such mode")


def careful_detector():
    model = detector_config()
    model.roi_heads.box_head["_target_"] = CarefulHead
    model.backbone.bottom_up = L(Careful)()
    model.backbone.update(in_features=["a", "b"], top_block=None)
    model.roi_heads.box_in_features = ["p2", "p3"]
    model.roi_heads.box_pooler.scales = [1 / 4, 1 / 8]
    return model


def needs_values(module, inputs):
    inputs[0].tolist()
    module.calls = getattr(module, "calls", 0) + 1


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_trunk_that_needs_values_is_run_on_the_cpu():
    backbone = instantiate(careful_detector().backbone)
    backbone.bottom_up.norm.eval()
    backbone.bottom_up.register_forward_pre_hook(needs_values)
    before, states = copy.deepcopy(backbone.state_dict()), random_states()
    assert freeze_unread(backbone, ["p3"]) == ["fpn_lateral2", "fpn_output2"]
    assert random_states() == states and not hasattr(backbone.bottom_up, "calls")
    assert backbone.training and not backbone.bottom_up.norm.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in backbone.parameters())
    backbone(torch.randn(1, 3, 16, 16))
    assert backbone.bottom_up.calls == 1


@pytest.mark.parametrize("built", [False, True])
def test_a_head_that_needs_values_has_its_channels(built):
    model = careful_detector()
    states = random_states()
    assert Detector(model).head.channels == 32
    assert random_states() == states
    if built:
        model = instantiate(model)
        model.roi_heads.box_head.register_forward_pre_hook(needs_values)
        assert Detector(model).head.channels == 32
        assert not hasattr(model.roi_heads.box_head, "calls")
        assert model.roi_heads.box_head.training


@pytest.mark.parametrize("method", ["soco", "mcl", "byol"])
@pytest.mark.parametrize("built", [False, True])
def test_methods_fit_a_detector_that_needs_values(method, built):
    model = careful_detector()
    if built:
        model = instantiate(model)
        model.backbone.register_forward_pre_hook(needs_values)
        model.backbone.bottom_up.register_forward_pre_hook(needs_values)
        model.roi_heads.box_head.register_forward_pre_hook(needs_values)
    cfg = load_method(method, model)
    trained = instantiate(cfg.model)
    assert isinstance(getattr(trained.backbone, "bottom_up", trained.backbone), Careful)
    assert not any(hasattr(module, "calls") for module in trained.modules())


def test_hooks_that_compute_weights_are_kept():
    backbone = instantiate(careful_detector().backbone)
    nn.utils.weight_norm(backbone.bottom_up.last)
    freeze_unread(backbone, ["p3"])
    assert backbone.bottom_up.last.weight_g.requires_grad


def test_a_module_that_fails_on_the_cpu_is_named():
    backbone = FPN(Broken(), ["a", "b"], 8)
    message = "the backbone FPN with the trunk Broken fails.* KeyError: 'no such mode'"
    with pytest.raises(UserError, match=message) as error:
        freeze_unread(backbone, ["p3"])
    assert isinstance(error.value.__cause__, KeyError)


def test_other_errors_are_those_of_the_meta_device():
    calls = []

    def compute():
        calls.append(torch.empty(0).device.type)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        dry_run(compute, "a head")
    assert calls == ["meta"]
