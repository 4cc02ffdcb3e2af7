"""Trunks with a dilated last stage, as DC5 detectors have, and with deformable convolutions."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from region_pretrain.config import load_config
from region_pretrain.convert.export import write_export
from region_pretrain.convert.facts import facts_of
from region_pretrain.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "yacs"))
from zoo import NARROW  # noqa: E402  found by the line above


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    overrides = [*NARROW, "MODEL.RESNETS.STRIDE_IN_1X1=False", "MODEL.RESNETS.NORM=BN"]
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", overrides)
    torch.manual_seed(0)
    detector = instantiate(cfg.model).eval()
    facts = facts_of(detector)
    assert facts.res5_dilation == 2
    path = tmp_path_factory.mktemp("dc5") / "model.pth"
    torch.save({"model": detector.state_dict(), "detector": facts.to_dict()}, path)
    return detector, str(path)


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_libraries_with_another_first_block_are_refused(checkpoint, tmp_path, to):
    with pytest.raises(UserError, match=r"dilation 2 in res5 \(DC5\).*Use --to mmdet or"):
        write_export(checkpoint[1], to, str(tmp_path / "out.pth"))


def test_mmdetections_config_computes_the_same(checkpoint, tmp_path):
    lines = write_export(checkpoint[1], "mmdet", str(tmp_path / "out.pth"))
    text = str(lines)
    assert "strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)" in text


def test_detectron2s_config_computes_the_same(checkpoint, tmp_path):
    detector, path = checkpoint
    _, lines = write_export(path, "detectron2", str(tmp_path / "out.pth"))
    assert "# and make res5 with first_stride=1 and dilation=2 (DC5)" in lines
    keys = [line.replace(" ", "=", 1) for line in lines[lines.index("# yacs") + 1 :]]
    plain = [*NARROW, "MODEL.RESNETS.RES5_DILATION=1"]
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", [*plain, *keys])
    other = instantiate(cfg.model).eval()
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    other.load_state_dict(state, strict=False)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = detector.backbone(image)["res5"], other.backbone(image)["res5"]
    assert ours.shape[-1] == 4 and torch.equal(ours, theirs)


@pytest.mark.parametrize("to", ["torchvision", "timm", "mmdet"])
def test_deformable_convolutions_are_refused(checkpoint, tmp_path, to):
    content = torch.load(checkpoint[1], weights_only=True)
    content["detector"]["res5_dilation"] = 1
    for block in range(3):
        name = f"backbone.res5.{block}.conv2_offset"
        content["model"] |= {
            f"{name}.weight": torch.zeros(18, 8, 3, 3),
            f"{name}.bias": torch.zeros(18),
        }
    path = str(tmp_path / "model.pth")
    torch.save(content, path)
    with pytest.raises(UserError, match="has deformable convolutions, .* Use --to detectron2"):
        write_export(path, to, str(tmp_path / "out.pth"))
    write_export(path, "detectron2", str(tmp_path / "out.pth"))
