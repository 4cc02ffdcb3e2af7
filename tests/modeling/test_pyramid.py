"""Pyramid maps that are read equal those of the complete pyramid; the others cost nothing."""

import copy
import logging

import pytest
import torch
from detectron2.config import instantiate

from region_pretrain.config import get_config
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps, pyramid_names


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
