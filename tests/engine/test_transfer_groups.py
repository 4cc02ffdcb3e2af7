"""Stages, FPN and heads are loaded completely or not at all."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.config import instantiate
from detectron2.modeling.backbone import ViT
from narrow_detector import PRETRAINED, build, save, state
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError


def test_a_part_of_a_stage_is_refused_unless_allowed(tmp_path, caplog):
    path = save(tmp_path, {"model": state(build(seed=1), *PRETRAINED)})
    # each further block of the 4 stages adds 2 convolutions of 5 tensors (absent counters apart)
    message = r"fills 12 of the 22 tensors of backbone.bottom_up.res2 and lacks .*res2.1.conv1.weig"
    with pytest.raises(UserError, match=message):
        load_pretrained(build(blocks=2), path)
    report = load_pretrained(build(blocks=2), path, partial=True)
    body = report.modules["backbone.bottom_up"]
    assert (body.loaded_tensors, body.tensors) == (66, 106)
    assert "fills 12 of the 22 tensors of backbone.bottom_up.res2" in caplog.text


def test_a_deeper_stage_is_refused_unless_allowed(tmp_path):
    path = save(tmp_path, {"model": state(build(seed=1, blocks=2), "backbone.")})
    with pytest.raises(UserError, match="has others there, such as .*res2.1.conv1.weight"):
        load_pretrained(build(), path)
    assert load_pretrained(build(), path, partial=True).modules["backbone.fpn"].loaded_tensors == 48


def test_a_fully_connected_layer_trained_behind_convolutions_is_refused(tmp_path):
    weights = state(build(seed=1), *PRETRAINED)
    weights["roi_heads.box_head.conv1.weight"] = torch.zeros(16, 16, 3, 3)
    path = save(tmp_path, {"model": weights})
    with pytest.raises(
        UserError, match=r"roi_heads.box_head.fc and has others there.*box_head.conv1"
    ):
        load_pretrained(build(), path)


def test_a_pyramid_without_norms_is_refused_unless_allowed(tmp_path):
    weights = state(build(seed=1, norm=""), "backbone.fpn")
    path = save(tmp_path, {"model": weights})
    with pytest.raises(UserError, match="fills 8 of the 40 tensors of backbone.fpn and lacks"):
        load_pretrained(build(), path)
    model = build()
    assert load_pretrained(model, path, partial=True).modules["backbone.fpn"].loaded_tensors == 8
    assert torch.equal(model.backbone.fpn_lateral3.weight, weights["backbone.fpn_lateral3.weight"])


def test_a_trunk_without_its_last_stage_is_refused_unless_allowed(tmp_path):
    weights = state(build(seed=1), "backbone.")
    weights = {k: v for k, v in weights.items() if ".res5." not in k}
    path = save(tmp_path, {"model": weights})
    message = "fills 0 of the 15 tensors of backbone.bottom_up.res5 and lacks .*res5.0"
    with pytest.raises(UserError, match=message):
        load_pretrained(build(), path)
    body = load_pretrained(build(), path, partial=True).modules["backbone.bottom_up"]
    # 11 convolutions with a norm, 3 of them in res5, whose counters are not counted
    assert (body.loaded_tensors, body.tensors) == (8 * 6, 11 * 6 - 3)


def test_a_stem_alone_is_not_a_trunk(tmp_path):
    weights = {k: v for k, v in state(build(seed=1), "backbone.").items() if "stem" in k}
    with pytest.raises(UserError, match="fills 0 of the .* tensors of backbone.bottom_up.res2"):
        load_pretrained(build(), save(tmp_path, {"model": weights}))


@pytest.mark.parametrize("layer", ["blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight"])
def test_layers_that_a_transformer_lacks_are_refused(tmp_path, layer):
    """DINOv2 scales each residual branch; without the scales, its features are wrong."""
    model = nn.Module()
    model.backbone = ViT(
        img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, pretrain_img_size=32,
        use_abs_pos=True, use_rel_pos=False, window_block_indexes=(),
    )  # fmt: skip
    file = {name: value + 1.0 for name, value in model.backbone.state_dict().items()}
    torch.save(
        file | {"norm.weight": torch.ones(16), "cls_token": torch.ones(1, 1, 16)},
        tmp_path / "a.pth",
    )
    report = load_pretrained(model, str(tmp_path / "a.pth"))
    assert len(report.matched) == len(file)
    torch.save(file | {layer: torch.ones(16)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=f"has others there, such as {layer}"):
        load_pretrained(model, str(tmp_path / "b.pth"))


@pytest.mark.parametrize("source", ["FPN", "torchvision"])
def test_a_trunk_fills_the_c4_detector_of_voc(tmp_path, source):
    """MoCo's detector for VOC has a norm after res5, which no trunk has."""
    model = instantiate(get_config("detection/faster_rcnn_r50_c4_voc.py").model)
    if source == "torchvision":
        weights = torchvision.models.resnet50(weights=None).state_dict()
        expected = weights["layer4.2.conv3.weight"]
    else:
        trunk = get_config("detection/mask_rcnn_r50_fpn_moco.py").model.backbone.bottom_up
        trunk = instantiate(trunk).state_dict()
        weights = {"model": {f"backbone.bottom_up.{name}": v for name, v in trunk.items()}}
        expected = trunk["res5.2.conv3.weight"]
    report = load_pretrained(model, save(tmp_path, weights))
    left = [n for n in report.missing if n.startswith(("backbone.", "roi_heads.res5."))]
    parts = ("weight", "bias", "running_mean", "running_var")
    assert [n for n in left if "num_batches" not in n] == [
        f"roi_heads.res5.norm.{p}" for p in parts
    ]
    assert torch.equal(model.roi_heads.res5[2].conv3.weight, expected)
