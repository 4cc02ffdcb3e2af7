"""Pyramid maps that are read equal those of the complete pyramid; the others cost nothing."""

import copy
import logging
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone, SwinTransformer
from omegaconf import DictConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from region_pretrain.config import get_config
from region_pretrain.engine.build import build_model
from region_pretrain.errors import UserError
from region_pretrain.modeling.pyramid import _top_down, freeze_unread, pyramid_maps, pyramid_names


@pytest.fixture
def fpn():
    torch.manual_seed(0)
    config = get_config("common/models/mask_rcnn_fpn_small.py").model.backbone
    return instantiate(config).eval()


@pytest.mark.parametrize("fuse", ["sum", "avg"])
@pytest.mark.parametrize(
    "reads",
    [
        {"p5": slice(0, 3), "p4": slice(3, 4), "p3": slice(4, 5), "p2": slice(5, 6)},
        {"p5": slice(0, 6), "p4": slice(0, 6), "p3": slice(0, 6), "p2": slice(0, 6)},
        {"p5": slice(0, 6)},
        {"p3": slice(1, 3), "p4": slice(4, 6)},  # the finer map of earlier images
    ],
)
def test_maps_are_those_of_the_complete_pyramid(fpn, reads, fuse):
    fpn._fuse_type = fuse
    images = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        whole, ours = fpn(images), pyramid_maps(fpn, images, reads)
    assert ours.keys() == reads.keys()
    for name, span in reads.items():
        torch.testing.assert_close(ours[name], whole[name][span])


def test_unread_maps_are_not_computed(fpn):
    calls = {}
    for name in ("fpn_lateral5", "fpn_output5", "fpn_lateral4", "fpn_output4", "fpn_lateral3"):
        getattr(fpn, name).register_forward_hook(
            lambda module, inputs, _, name=name: calls.__setitem__(name, len(inputs[0]))
        )
    with torch.no_grad():
        pyramid_maps(fpn, torch.randn(6, 3, 64, 64), {"p5": slice(0, 4), "p4": slice(4, 6)})
    assert calls == {"fpn_lateral5": 6, "fpn_output5": 4, "fpn_lateral4": 2, "fpn_output4": 2}


class PathAggregation(FPN):
    """An FPN with a path from fine to coarse maps, as forks of Detectron2 write it."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.down = nn.ModuleList(nn.Conv2d(32, 32, 3, 2, 1) for _ in self.in_features[1:])

    def forward(self, x):
        assert x.shape[1] == 3 and self.bottom_up.size_divisibility == 0
        maps = super().forward(x)
        finer = maps["p2"]
        for name, down in zip(("p3", "p4", "p5"), self.down, strict=True):
            finer = maps[name] = maps[name] + down(finer)
        return maps


def test_a_pyramid_with_a_forward_of_its_own_computes_that(fpn):
    torch.manual_seed(0)
    channels = [shape.channels for shape in fpn.bottom_up.output_shape().values()]
    assert len(channels) == 4
    path = PathAggregation(
        bottom_up=fpn.bottom_up, in_features=fpn.in_features, out_channels=32, norm=""
    ).eval()
    images = torch.randn(4, 3, 64, 64)
    reads = {"p5": slice(0, 3), "p3": slice(3, 4)}
    with torch.no_grad():
        whole, ours = path(images), pyramid_maps(path, images, reads)
    assert isinstance(path.bottom_up, type(fpn.bottom_up))
    for name, span in reads.items():
        torch.testing.assert_close(ours[name], whole[name][span])
    assert freeze_unread(path, ["p3"]) == ["fpn_output4", "fpn_output5", "down.1", "down.2"]
    pyramid_maps(path, images, {"p3": slice(0, 4)})["p3"].sum().backward()
    assert path.down[0].weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="PathAggregation has a forward .* multiples of 32 pixels"):
        pyramid_maps(path, torch.randn(1, 3, 112, 112), reads)


def count(counts, name, _):
    counts[name] += 1


def test_recomputed_activations_accumulate_each_gradient_once():
    """DDP fails on a second time, which reentrant checkpoints of a network run twice would be."""
    cfg = DictConfig({"train": {"seed": 0, "channels_last": False}}, flags={"allow_objects": True})
    cfg.model = LazyCall(SwinTransformer)(
        embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, out_indices=[1]
    )
    cfg.model.use_checkpoint = True
    torch.manual_seed(0)
    images, found = torch.randn(2, 3, 32, 32), []
    for recompute in (True, False):
        cfg.model.use_checkpoint = recompute
        model, counts = build_model(cfg, torch.device("cpu")), Counter()
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(count, counts, name))
        maps = [next(iter(model(part).values())) for part in (images, images.flip(-1))]
        sum(m.square().sum() for m in maps).backward()
        assert set(counts.values()) == {1}
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)


def test_a_backbone_without_fpn_runs_completely(fpn):
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        maps = pyramid_maps(fpn.bottom_up, images, {"res5": slice(1, 3)})
        torch.testing.assert_close(maps["res5"], fpn.bottom_up(images)["res5"][1:3])
    assert pyramid_names(fpn) == ["p2", "p3", "p4", "p5"]
    assert pyramid_names(fpn.bottom_up) == ["res2", "res3", "res4", "res5"]


def test_exactly_the_unread_convolutions_are_frozen(fpn, caplog):
    for name in ("p2", "p4"):
        backbone = copy.deepcopy(fpn).train()
        with caplog.at_level(logging.INFO):
            frozen = freeze_unread(backbone, [name])
        maps = pyramid_maps(backbone, torch.randn(2, 3, 64, 64), {name: slice(0, 2)})
        maps[name].square().sum().backward()
        for parameter_name, parameter in backbone.named_parameters():
            read = parameter_name.split(".")[0] not in frozen
            assert read == parameter.requires_grad == (parameter.grad is not None)
    assert frozen == ["fpn_lateral2", "fpn_output2", "fpn_lateral3", "fpn_output3", "fpn_output5"]
    assert f"maps read: p4; not trained: {', '.join(frozen)}" in caplog.text
    assert freeze_unread(backbone.bottom_up, ["res5"]) == []


@pytest.mark.parametrize("fuse", ["sum", "avg"])
def test_trunks_that_round_down_are_registered(fpn, fuse):
    """ConvNeXt's last map of a view of 112 pixels has 3 cells, not 4: each covers two of 7."""
    fpn._fuse_type = fuse
    maps = {f"res{i}": torch.randn(2, fpn.bottom_up.output_shape()[f"res{i}"].channels, n, n)
            for i, n in ((2, 28), (3, 14), (4, 7), (5, 3))}  # fmt: skip
    with torch.no_grad():
        found = _top_down(fpn, maps, dict.fromkeys(["p4"], slice(0, 2)))["p4"]
        coarse, fine = fpn.fpn_lateral5(maps["res5"]), fpn.fpn_lateral4(maps["res4"])
        for y in range(7):
            for x in range(7):
                fine[..., y, x] += coarse[..., min(y // 2, 2), min(x // 2, 2)]
        fine = fine / 2 if fuse == "avg" else fine
        torch.testing.assert_close(found, fpn.fpn_output4(fine))


class DeformConv(nn.Module):
    """As Detectron2's, which has no backward pass on the CPU."""

    norm, activation, groups = None, staticmethod(F.relu), 1
    stride, padding, dilation = (1, 1), (1, 1), (1, 1)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8, 3, 3))
        self.bias = None

    def forward(self, x, offset):
        raise NotImplementedError("Deformable Conv is not supported on CPUs!")


class Recomputing(Backbone):
    """A deformable convolution; reentrant checkpoints, which autograd.grad refuses."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.conv2_offset, self.conv2 = nn.Conv2d(8, 18, 3, padding=1), DeformConv()
        self.last, self.unread = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.use_checkpoint = True

    def forward(self, x):
        x = self.stem(x)
        x = self.conv2(x, self.conv2_offset(x))
        last = checkpoint(self.last, x, use_reentrant=True) if self.use_checkpoint else self.last(x)
        return {"a": last, "b": self.unread(x)}

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=4) for name in "ab"}


def test_deformable_and_recomputed_layers_are_read():
    backbone = Recomputing()
    assert freeze_unread(backbone, ["a"]) == ["unread"]
    assert backbone.use_checkpoint and "forward" not in backbone.conv2.__dict__
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert {"conv2.weight", "conv2_offset.weight", "stem.weight", "last.weight"} <= trained
