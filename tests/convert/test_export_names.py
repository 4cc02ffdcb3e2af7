"""Export and import are inverse; what a target cannot express is refused or named."""

import re

import pytest
import timm
import torch
import torchvision
from export_models import (
    NORMED,
    RETINA,
    SMALL,
    bottlenecks,
    built,
    comments,
    from_yacs,
    mmdet_names,
    save,
)
from safetensors import safe_open
from torchvision.models.detection import retinanet_resnet50_fpn

from region_pretrain.convert import names
from region_pretrain.convert.export import TARGETS, export_weights, matches_of, write_export
from region_pretrain.convert.facts import IMAGENET, MSRA, Facts, facts_of
from region_pretrain.convert.recognise import read_weights
from region_pretrain.errors import UserError


def sources() -> dict:
    """Scheme -> names and tensors of a network of that library, and the target to go back to."""
    torch.manual_seed(0)
    detection = torchvision.models.detection
    none = {"weights": None, "weights_backbone": None}
    mm = {name: torch.randn(shape) for name, shape in mmdet_names().items()}
    return {
        "torchvision": (lambda: torchvision.models.resnet18().state_dict(), "torchvision"),
        "timm": (lambda: timm.create_model("resnet18").state_dict(), "timm"),
        "torchvision's detector": (
            lambda: detection.maskrcnn_resnet50_fpn_v2(**none).state_dict(),
            "torchvision",
        ),
        "torchvision's RetinaNet": (
            lambda: retinanet_resnet50_fpn(**none).state_dict(),
            "torchvision",
        ),
        "mmdet": (lambda: mm, "mmdet"),
        "swin": (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224", embed_dim=12, num_heads=(1, 2, 3, 4)
            ).state_dict(),
            "timm",
        ),
        "vit": (
            lambda: timm.create_model(
                "vit_tiny_patch16_224", embed_dim=64, depth=2, num_heads=1
            ).state_dict(),
            "timm",
        ),
    }


#: What Detectron2 has no tensor for: classifiers, and the background's boxes and masks.
LOST = r"(fc|head|norm|cls_token)(\..*)?$"
ADDED = {
    "roi_heads.box_predictor.bbox_pred.": 4,
    "roi_heads.mask_predictor.mask_fcn_logits.": 1,
}


@pytest.mark.parametrize("source", sources())
def test_import_and_export_give_back_the_same_tensors(tmp_path, source):
    make, to = sources()[source]
    given = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in make().items()}
    path = save(tmp_path / "x.pth", given, IMAGENET)
    state, _ = export_weights(path, to)
    lost = LOST if "torchvision's" not in source else "$"
    assert state.keys() == {name for name in given if not re.match(lost, name)}
    for name, tensor in state.items():
        expected = given[name].clone()
        for prefix, count in ADDED.items():
            if name.startswith(prefix) and to == "torchvision":
                expected[:count] = 0
        if name.startswith("head.classification_head.cls_logits."):
            expected.unflatten(0, (9, -1))[:, 0] = -10 if name.endswith("bias") else 0
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", ["plain", "norms", "retinanet", "trunk"])
def test_export_and_import_give_back_the_same_tensors(tmp_path, to, kind):
    model = {
        "plain": lambda: from_yacs(SMALL, ["MODEL.RPN.CONV_DIMS", [-1, -1]]),
        "norms": lambda: from_yacs(SMALL, NORMED),
        "retinanet": lambda: from_yacs(RETINA),
        "trunk": bottlenecks,
    }[kind]()
    path = save(tmp_path / "x.pth", model)
    before = read_weights(path)
    out, lines = write_export(path, to)
    after = read_weights(out)
    missing = before.tensors.keys() - after.tensors.keys()
    if to == "timm":
        missing -= {k for k in before.tensors if not k.startswith(("stem.", "res"))}
    if to == "mmdet" and kind == "plain":
        assert comments(lines, "left out: the RPN") and missing
        missing -= {k for k in before.tensors if k.startswith("proposal_generator.")}
    assert not missing and after.tensors.keys() <= before.tensors.keys()
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor, before.tensors[name]), name
    if to in ("detectron2", "safetensors"):
        assert after.facts == before.facts == IMAGENET
        assert after.names == before.names


def test_patterns_are_expanded():
    assert matches_of(r"a\.(?:0\.)?(w|b)") == ["a.0.w", "a.0.b", "a.w", "a.b"]
    assert matches_of(r"x[0-2]|y[35]") == ["x0", "x1", "x2", "y3", "y5"]
    assert matches_of(r"\d+") == [str(i) for i in range(48)]


@pytest.mark.parametrize(
    "rules", ["RESNET", "TORCHVISION_DETECTOR", "MMDETECTION", "SWIN_TIMM", "VIT"]
)
def test_expanded_names_match_their_patterns_and_no_name_is_missed(rules):
    """Checked on every 97th of some 10,000 names per pattern."""
    for pattern, _ in getattr(names, rules):
        found = matches_of(pattern)
        assert found and all(re.fullmatch(pattern, name) for name in found[::97])
        for name in found[::97]:  # other numbers of one digit are names as well
            other = re.sub(r"\d", "4", name)
            assert not re.fullmatch(pattern, other) or other in found or "44" in other


def test_a_trunk_s_extra_tensors_are_named(tmp_path):
    model = bottlenecks()
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    state["roi_heads.mask_head.deconv.weight"] = torch.ones(2, 2, 1, 1)
    state["mask_iou.weight"] = torch.ones(2)
    path = save(tmp_path / "x.pth", state)
    _, lines = export_weights(path, "torchvision")
    assert comments(lines, "left out") == [
        "# left out: the heads: without an FPN, as in C4 detectors, torchvision gets the trunk "
        "only",
        "# left out, not exported to torchvision: mask_iou.weight",
    ]


def test_detectors_keep_tensors_that_no_module_is_known_for(tmp_path):
    state = from_yacs(SMALL).state_dict() | {"pixel_mean": torch.ones(3, 1, 1)}
    exported, _ = export_weights(save(tmp_path / "x.pth", state), "detectron2")
    assert exported.keys() == state.keys()
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    renamed, _ = export_weights(save(tmp_path / "y.pth", state), "detectron2")
    assert renamed.keys() == exported.keys()


def test_anchors_in_an_unknown_order_stay_behind(tmp_path):
    ours = from_yacs(RETINA, ["MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]]])
    for to in ("torchvision", "mmdet"):
        state, lines = export_weights(save(tmp_path / "x.pth", ours), to)
        assert comments(lines, "left out: RetinaNet's predictors: the order of 6 anchors")
        assert not any(re.search("cls_logits|bbox_reg|retina_", name) for name in state)
        missing = {
            "torchvision": "head.classification_head.cls_logits, head.regression_head.bbox_reg",
            "mmdet": "bbox_head.retina_cls, bbox_head.retina_reg",
        }[to]
        assert comments(lines, "not filled") == [f"# not filled: {missing}"]


def test_class_agnostic_boxes_stay_behind(tmp_path):
    ours = from_yacs(SMALL, ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True])
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "torchvision")
    assert not any("box_predictor" in name for name in state)
    assert comments(lines, "left out") == [
        "# left out: the box predictor: torchvision has boxes per class, these are class-agnostic"
    ]
    assert comments(lines, "not filled") == ["# not filled: roi_heads.box_predictor"]


@pytest.mark.parametrize("change", ["boxes", "convolutions"])
def test_masks_alone_have_the_number_of_classes(tmp_path, change):
    """Their predictor is exported, although the boxes', from which it is usually known, is not."""
    ours = from_yacs(SMALL, ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True])
    if change == "convolutions":
        ours = from_yacs(SMALL, ["MODEL.ROI_BOX_HEAD.NUM_CONV", 4])
        state = ours.state_dict()
        ours = {name: value for name, value in state.items() if "box_predictor" not in name}
    exported, lines = export_weights(save(tmp_path / "x.pth", ours), "torchvision")
    model = built(lines)
    assert "num_classes = 6  # class 0 is the background" in lines
    assert not model.load_state_dict(exported, strict=False).unexpected_keys
    assert len(model.roi_heads.mask_predictor.mask_fcn_logits.weight) == 6


def test_mmdetections_heads_have_their_classes_and_widths(tmp_path):
    def head_lines(model):
        _, lines = export_weights(save(tmp_path / "x.pth", model), "mmdet")
        return {line.partition(" = ")[0]: line for line in lines if "_head = " in line}

    mask = head_lines(from_yacs(SMALL))
    assert "in_channels=32" in mask["bbox_head"] and "num_classes=5" in mask["bbox_head"]
    assert mask["mask_head"] == (
        "mask_head = dict(type='FCNMaskHead', num_convs=4, in_channels=32, conv_out_channels=32, "
        "num_classes=5)  # of roi_head"
    )
    agnostic = head_lines(from_yacs(SMALL, ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]))
    assert "num_classes=5, class_agnostic=True)" in agnostic["mask_head"]
    assert head_lines(from_yacs(RETINA)) == {
        "bbox_head": "bbox_head = dict(type='RetinaHead', stacked_convs=4, in_channels=32, "
        "num_classes=5, feat_channels=32)"
    }


def test_detectron2s_lines_have_the_norm_of_each_part(tmp_path):
    def lines_of(*changes):
        model = from_yacs(SMALL, NORMED, changes)
        return export_weights(save(tmp_path / "x.pth", model, facts_of(model)), "detectron2")[1]

    lines = lines_of("MODEL.RESNETS.NORM", "FrozenBN")
    assert {"MODEL.RESNETS.NORM FrozenBN", "MODEL.FPN.NORM BN"} <= set(lines)
    assert {"MODEL.ROI_BOX_HEAD.NORM BN", "model.backbone.norm=BN"} <= set(lines)
    lines = lines_of("MODEL.ROI_BOX_HEAD.NORM", "SyncBN")  # a ResNet-18 of basic blocks
    assert {"MODEL.RESNETS.NORM BN", "MODEL.ROI_BOX_HEAD.NORM SyncBN"} <= set(lines)


def test_pretrained_detector_names_what_is_not_filled(tmp_path):
    ours = from_yacs(SMALL, NORMED)
    state = {k: v for k, v in ours.state_dict().items() if re.match(r"backbone|.*box_head", k)}
    exported, lines = export_weights(save(tmp_path / "x.pth", state), "torchvision")
    assert comments(lines, "not filled") == ["# not filled: rpn.head, roi_heads.box_predictor"]
    missing, unexpected = built(lines).load_state_dict(exported, strict=False)
    assert {name.rsplit(".", 2)[0] for name in missing} <= {
        "rpn.head", "rpn.head.conv.0", "roi_heads.box_predictor"
    }  # fmt: skip
    assert not unexpected


def test_a_box_head_of_convolutions_alone_keeps_them(tmp_path):
    """As after MCL."""
    ours = from_yacs(SMALL, NORMED)
    state = {k: v for k, v in ours.state_dict().items() if re.match(r"backbone|.*box_head.conv", k)}
    path = save(tmp_path / "x.pth", state)
    exported, lines = export_weights(path, "torchvision")
    assert comments(lines, "not filled") == [
        "# not filled: rpn.head, roi_heads.box_head.5, roi_heads.box_predictor"
    ]
    model = built(lines)
    missing, unexpected = model.load_state_dict(exported, strict=False)
    assert not unexpected and {name.rpartition(".")[0] for name in missing} >= {
        "roi_heads.box_head.5"
    }
    pooled = torch.randn(3, 32, 7, 7)
    head = ours.roi_heads.box_head
    expected = head.conv4(head.conv3(head.conv2(head.conv1(pooled))))
    for layer in list(model.roi_heads.box_head)[:4]:
        pooled = layer(pooled)
    assert torch.equal(pooled, expected)

    exported, lines = export_weights(path, "mmdet")
    assert any("num_shared_convs=4, num_shared_fcs=1, fc_out_channels=1024" in s for s in lines)
    assert comments(lines, "not filled") == [
        "# not filled: rpn_head, roi_head.bbox_head.shared_fcs, roi_head.bbox_head.fc_cls, "
        "roi_head.bbox_head.fc_reg, roi_head.mask_head"
    ]
    _, lines = export_weights(path, "detectron2")
    assert {
        "model.roi_heads.box_head.conv_dims=[32,32,32,32]",
        "MODEL.ROI_BOX_HEAD.NUM_CONV 4",
    } < set(lines)
    assert not any(
        "fc" in line.lower().partition("=")[0].split(".")[-1] for line in lines if "=" in line
    )


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_stride_in_the_1x1_convolution_is_refused(tmp_path, to):
    path = save(tmp_path / "x.pth", bottlenecks(stride_in_1x1=True), MSRA)
    with pytest.raises(UserError, match=f"x.pth has the stride in .* 1x1 .*which {to}'s ResNet"):
        export_weights(path, to)


def test_mmdetection_has_a_style_for_that_stride_and_for_bgr(tmp_path):
    path = save(tmp_path / "x.pth", bottlenecks(stride_in_1x1=True), MSRA)
    _, lines = export_weights(path, "mmdet")
    text = "\n".join(lines)
    assert "style='caffe'" in text and "bgr_to_rgb=False" in text
    assert "mean=[103.53, 116.28, 123.675], std=[1, 1, 1]" in text
    _, lines = export_weights(path, "detectron2")
    assert {"INPUT.FORMAT BGR", "MODEL.RESNETS.STRIDE_IN_1X1 True"} <= set(lines)


def test_bgr_weights_stay_and_the_lines_say_what_to_feed(tmp_path):
    model = bottlenecks()
    facts = Facts("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), False)
    state, lines = export_weights(save(tmp_path / "x.pth", model, facts), "timm")
    assert torch.equal(state["conv1.weight"], model.stem.conv1.weight)
    assert "# the model must be fed BGR images: image[[2, 1, 0]]" in lines
    assert "mean = [0.406, 0.456, 0.485]  # BGR, for pixels in [0, 1]" in lines


def test_unknown_facts_are_admitted(tmp_path):
    path = save(tmp_path / "x.pth", bottlenecks(), None)
    for to in TARGETS:
        _, lines = export_weights(path, to)
        assert comments(lines, "pixel format, mean and std are unknown"), to
        if to in ("torchvision", "timm", "mmdet"):
            assert comments(lines, "the stride of the bottlenecks is unknown"), to


def test_safetensors_have_the_facts_as_metadata(tmp_path):
    out, _ = write_export(save(tmp_path / "x.pth", bottlenecks()), "safetensors")
    with safe_open(out, "pt") as file:
        assert '"input_format": "RGB"' in file.metadata()["detector"]
        assert "stem.conv1.weight" in file.keys()


@pytest.mark.parametrize(
    "to, out, message",
    [
        ("keras", None, "--to keras: must be one of torchvision, timm"),
        ("timm", "y.pkl", r"--out y.pkl: a file for timm must end in .pth"),
        ("detectron2", "y.safetensors", "must end in .pth or .pkl"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, to, out, message):
    path = save(tmp_path / "x.pth", bottlenecks())
    with pytest.raises(UserError, match=message):
        write_export(path, to, out)


def test_other_networks_are_refused(tmp_path):
    swin = {"layers.0.blocks.0.attn.qkv.weight": torch.ones(3, 1)}
    with pytest.raises(UserError, match="no ResNet to export to mmdet.*use --to timm"):
        export_weights(save(tmp_path / "swin.pth", swin), "mmdet")
    with pytest.raises(UserError, match="no ResNet, Swin or ViT to export to timm"):
        export_weights(save(tmp_path / "x.pth", {"a.weight": torch.ones(1)}), "timm")
    with pytest.raises(UserError, match="no batch norm in its trunk"):
        export_weights(save(tmp_path / "gn.pth", bottlenecks(norm="GN")), "mmdet")
    with pytest.raises(UserError, match="has no model_final.pth"):
        export_weights(str(tmp_path), "timm")


@pytest.mark.parametrize("to", sorted(TARGETS))
def test_a_stem_without_stages_is_refused(tmp_path, to):
    stem = {name: value for name, value in bottlenecks().state_dict().items() if "res" not in name}
    assert "stem.conv1.weight" in stem
    with pytest.raises(UserError, match="a stem, but no first residual stage"):
        export_weights(save(tmp_path / "stem.pth", stem), to)
