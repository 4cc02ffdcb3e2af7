"""The contract of a pre-training method, and what happens to a method that breaks it."""

import copy
import math

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from region_pretrain.data.views import ViewSampler
from region_pretrain.engine.checkpoint import split_state
from region_pretrain.errors import UserError
from region_pretrain.modeling.meta_arch import (
    PretrainingModel,
    check_contract,
    renew_momentum_copies,
)
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.norms import SyncBatchNorm, use_sync_batchnorm


class Minimal(PretrainingModel):
    detector_modules = ("backbone",)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2))
        self.head = nn.Linear(2, 2)
        self.target = MomentumCopy({"backbone": self.backbone, "head": self.head})

    def forward(self, batch):
        return {"loss": self.head(self.backbone(batch)).sum()}


@pytest.mark.parametrize("name", ["before_steps", "befor_step", "after_stpe", "on_weight_loaded"])
def test_a_misspelt_hook_is_an_error_when_the_class_is_defined(name):
    with pytest.raises(TypeError, match=rf"{name} would never be called: rename it to \w+_\w+ if"):
        type("Misspelt", (Minimal,), {name: lambda self, iteration, max_iter: None})


def test_a_hook_with_other_arguments_is_an_error_when_the_class_is_defined():
    with pytest.raises(TypeError, match="must accept the arguments of before_step"):
        type("Short", (Minimal,), {"before_step": lambda self, iteration: None})
    with pytest.raises(TypeError, match="must accept the arguments of __call__"):
        type("Views", (ViewSampler,), {"__call__": lambda self, width, height, boxes: []})


def test_other_methods_may_have_any_other_name():
    own = {"embed": lambda self: None, "_before_steps": lambda self: None, "step": lambda s: None}
    assert isinstance(type("Own", (Minimal,), own)(), Minimal)


@pytest.mark.parametrize("missing", ["forward", "detector_modules"])
def test_an_incomplete_model_cannot_be_built(missing):
    members = {"forward": lambda self, batch: {}, "detector_modules": ("backbone",)}
    members.pop(missing)
    with pytest.raises(TypeError, match=missing):
        type("Lacking", (PretrainingModel,), members)()


def test_a_model_that_cannot_be_pretrained_is_an_error_that_names_it():
    assert isinstance(check_contract(Minimal()), Minimal)
    with pytest.raises(UserError, match="builds a Linear, which is not a PretrainingModel"):
        check_contract(nn.Linear(2, 2))
    model = Minimal()
    for wrong in (("backbone", "roi_head"), ()):
        model.detector_modules = wrong
        with pytest.raises(UserError, match="must name submodules of the model, which has back"):
            check_contract(model)


def test_loading_weights_renews_every_momentum_copy_and_then_notifies_the_model():
    notified = []

    class Notified(Minimal):
        def on_weights_loaded(self) -> None:
            notified.append(torch.equal(self.target["head"].weight, self.head.weight))

    model = Notified()
    model.nested = nn.ModuleDict({"copy": MomentumCopy({"head": model.head})})
    with torch.no_grad():
        for parameter in [*model.backbone.parameters(), *model.head.parameters()]:
            parameter.add_(1.0)
    assert not torch.equal(model.target["head"].weight, model.head.weight)
    renew_momentum_copies(model)
    assert notified == [True]
    for name, module in (("backbone", model.backbone), ("head", model.head)):
        for mine, online in zip(model.target[name].parameters(), module.parameters(), strict=True):
            assert torch.equal(mine, online)
    assert torch.equal(model.nested["copy"]["head"].weight, model.head.weight)


def test_a_renewed_copy_has_the_frozen_norms_of_the_loaded_network():
    """All tensors of Detectron2's frozen batch norms are buffers."""
    model = Minimal()
    online = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.BatchNorm2d(4))
    model.frozen = MomentumCopy({"net": online})
    with torch.no_grad():
        for tensor in online.state_dict().values():
            tensor.add_(1)
    renew_momentum_copies(model)
    copied = model.frozen["net"].state_dict()
    assert all(torch.equal(copied[name], value) for name, value in online.state_dict().items())
    image = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(model.frozen["net"].eval()(image), online.eval()(image))


def test_a_momentum_copy_remembers_its_online_network_without_owning_it():
    model = Minimal()
    assert set(model.target.state_dict()) == {
        f"{name}.{key}"
        for name in ("backbone", "head")
        for key in getattr(model, name).state_dict()
    }
    detector, rest = split_state(model)
    assert set(detector) == {f"backbone.{key}" for key in model.backbone.state_dict()}
    assert len(rest) == len(model.state_dict()) - len(detector)
    # It follows in a deep copy of the model, and when norms are replaced in the online network.
    twin = use_sync_batchnorm(copy.deepcopy(model))
    assert type(twin.backbone[1]) is SyncBatchNorm
    before = twin.target["backbone"][1].weight.clone()
    with torch.no_grad():
        twin.backbone[1].weight.fill_(3.0)
    twin.target.ema_update(momentum=0.75)
    torch.testing.assert_close(
        twin.target["backbone"][1].weight, 0.75 * before + 0.25 * twin.backbone[1].weight
    )
    assert torch.equal(model.target["backbone"][1].weight, before)

    norm = nn.SyncBatchNorm(2)
    copied = MomentumCopy({"norm": norm})
    assert type(use_sync_batchnorm(norm)) is SyncBatchNorm
    nn.init.constant_(norm.weight, 5.0)
    copied.ema_update(momentum=0.5)
    assert copied["norm"].weight.tolist() == [3.0, 3.0]
    for momentum in (1.2, -0.5, math.nan):  # the copy would diverge
        with pytest.raises(UserError, match=f"model.momentum gives {momentum}: it must be from"):
            copied.ema_update(momentum)
    assert copied["norm"].weight.tolist() == [3.0, 3.0]
