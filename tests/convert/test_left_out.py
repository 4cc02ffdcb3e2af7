"""Heads that an export leaves out: they are named, and the printed code works without them."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from export_models import RETINA, SMALL, built, comments, from_yacs, save
from torch import nn

from region_pretrain.convert.export import export_weights

CASCADE = [
    "MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
]  # fmt: skip
KEYPOINTS = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [32]]


def assert_runs(lines: list[str], state: dict) -> nn.Module:
    """The printed network takes the exported weights, has nothing else but a head, and runs."""
    model = built(lines)
    keys = model.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(name.startswith("head.") for name in keys.missing_keys)
    with torch.no_grad():
        assert model([torch.rand(3, 64, 64)])[0]["boxes"].shape[1] == 4
    return model


def test_heads_that_stay_behind_tell_the_number_of_classes(tmp_path):
    ours = from_yacs(RETINA, ["MODEL.RETINANET.NORM", "GN"])
    exported, lines = export_weights(save(tmp_path / "x.pth", ours), "torchvision")
    assert comments(lines, "left out: RetinaNet's head: one with norms is not supported")
    assert "num_classes = 6  # class 0 is the background, which has no boxes" in lines
    assert_runs(lines, exported)
    ours = {k: v for k, v in ours.state_dict().items() if not k.startswith("head.")}
    exported, lines = export_weights(save(tmp_path / "x.pth", ours), "torchvision")
    assert comments(lines, "not filled: head.") and "91  # of COCO: set your number" in str(lines)
    assert_runs(lines, exported)


@pytest.mark.parametrize("to", ["torchvision", "mmdet"])
@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (CASCADE, "roi_heads.box_head, roi_heads.box_predictor"),
        (KEYPOINTS, "roi_heads.keypoint_head"),
    ],
    ids=["cascade", "keypoints"],
)
def test_heads_that_are_left_out_are_named(tmp_path, to, settings, left):
    _, lines = export_weights(save(tmp_path / "x.pth", from_yacs(SMALL, settings)), to)
    assert comments(lines, "left out") == [f"# left out, not exported to {to}: {left}"]


def test_fcos_is_built_without_its_head(tmp_path):
    lazy = model_zoo.get_config("common/models/fcos.py").model
    lazy.backbone.bottom_up.stages.depth, lazy.num_classes = 18, 5
    del lazy.backbone.bottom_up.stages.stride_in_1x1
    lazy.backbone.in_features = ["res3", "res4", "res5"]
    for norm in ("GN", ""):
        lazy.head.norm = norm
        ours = save(tmp_path / "x.pth", instantiate(lazy))
        assert comments(export_weights(ours, "mmdet")[1], "left out: FCOS's head: it is not")
        exported, lines = export_weights(ours, "torchvision")
        assert comments(lines, "left out: FCOS's head: it is not exported to torchvision")
        assert "num_classes = 6  # class 0 is the background, which has no boxes" in lines
        assert type(assert_runs(lines, exported)).__name__ == "FCOS"
    _, lines = export_weights(ours, "detectron2")
    assert not any("model.input_format" in line for line in lines)
