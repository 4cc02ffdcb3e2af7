"""Exported weights, loaded into the libraries that they are for, give the same features."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg, instantiate
from detectron2.config.lazy import LazyConfig
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.modeling.backbone.vit import ViT
from safetensors import safe_open
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from region_pretrain.convert.export import TARGETS, export_weights, matches_of, write_export
from region_pretrain.convert.facts import IMAGENET, MSRA, Facts, facts_of
from region_pretrain.convert.recognise import read_weights
from region_pretrain.errors import UserError

STAGES = ("res2", "res3", "res4", "res5")
RGB = [
    "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD", [58.395, 57.12, 57.375], "MODEL.DEVICE", "cpu",
]  # fmt: skip
#: Mask R-CNN R18-FPN with 32 channels.
SMALL = [
    *RGB, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True,
    "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.RESNETS.OUT_FEATURES", list(STAGES), "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN",
    "MODEL.FPN.IN_FEATURES", list(STAGES), "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 5,
    "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14,
]  # fmt: skip
NORMED = [
    "MODEL.FPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
    "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN",
]  # fmt: skip
RETINA = [
    *SMALL, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", False,
    "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", list(STAGES[1:]), "MODEL.FPN.IN_FEATURES", list(STAGES[1:]),
    "MODEL.RETINANET.NUM_CLASSES", 5,
    "MODEL.ANCHOR_GENERATOR.SIZES",
    [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)],
]  # fmt: skip


def randomise(model: nn.Module) -> nn.Module:
    """Give every tensor a value of its own, so that none can be confused with another."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "norm.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1)
        elif name.endswith(("pos_embed", "bias_table", "logits.weight")):
            tensor.normal_(0, 0.1)
    return model.eval()


def from_yacs(*settings) -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list([item for part in settings for item in part])
    return randomise(build_model(cfg))


def bottlenecks(groups=1, stride_in_1x1=False, norm="BN", widths=(64, 128, 256, 512)) -> ResNet:
    """One block per stage."""
    channels = [64, *(4 * width for width in widths)]
    stages = [
        ResNet.make_stage(
            BottleneckBlock,
            1,
            in_channels=channels[i],
            out_channels=channels[i + 1],
            bottleneck_channels=width,
            num_groups=groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            stride_per_block=[1 if i == 0 else 2],
        )
        for i, width in enumerate(widths)
    ]
    return randomise(ResNet(BasicStem(norm=norm), stages, out_features=list(STAGES)))


def save(path: Path, model: nn.Module | dict, facts: Facts | None = IMAGENET) -> str:
    state = model if isinstance(model, dict) else model.state_dict()
    torch.save({"model": state, **({"detector": facts.to_dict()} if facts else {})}, path)
    return str(path)


def built(lines: list[str]) -> nn.Module:
    """The network that the lines for torchvision or timm construct."""
    scope: dict = {}
    exec("\n".join(lines), scope)
    return scope["model"].eval()


def comments(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if line.startswith(f"# {start}")]


def images(seed=1, side=64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def trunk_features(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for i in range(1, 5):
        getattr(model, f"layer{i}").register_forward_hook(lambda m, a, out: found.append(out))
    model(inputs)
    return found


def assert_same(theirs, ours, within: float = 0.0) -> None:
    theirs, ours = list(theirs), list(ours)
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        assert b.abs().max() > 0.01
        assert (a - b).abs().max().item() <= within


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@pytest.mark.parametrize("kind", ["resnet18", "bottlenecks", "resnext"])
@torch.no_grad()
def test_trunk_has_the_same_features(tmp_path, to, kind):
    if kind == "resnet18":
        model = from_yacs(SMALL).backbone.bottom_up
    else:
        model = bottlenecks(groups=2 if kind == "resnext" else 1)
    state, lines = export_weights(save(tmp_path / "x.pth", model), to)
    theirs = built(lines)
    theirs.load_state_dict(state, strict=True)
    assert_same(trunk_features(theirs, images()), model(images()).values())
    assert not comments(lines, "left out") + comments(lines, "not filled")


@torch.no_grad()
def test_normalisation_in_unit_range_is_the_detector_s(tmp_path):
    _, lines = export_weights(save(tmp_path / "x.pth", bottlenecks()), "torchvision")
    scope: dict = {}
    exec("\n".join(lines), scope)
    pixels = torch.rand(3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET.pixel_mean, IMAGENET.pixel_std))
    assert torch.allclose(scope["normalize"](pixels), (pixels * 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [[], NORMED, ["MODEL.RPN.CONV_DIMS", [-1, -1]], ["MODEL.MASK_ON", False]],
    ids=["plain", "norms", "two RPN convolutions", "Faster R-CNN"],
)
@torch.no_grad()
def test_torchvision_detector_computes_the_same(tmp_path, settings):
    ours = from_yacs(SMALL, settings)
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "torchvision")
    theirs = built(lines)
    theirs.load_state_dict(state, strict=True)
    assert not comments(lines, "left out") + comments(lines, "not filled")

    features = list(ours.backbone(images()).values())
    assert_same(theirs.backbone(images()).values(), features)
    pairs = zip(theirs.rpn.head(features), ours.proposal_generator.rpn_head(features), strict=True)
    for a, b in pairs:
        assert_same(a, b)

    pooled = torch.randn(3, 32, 7, 7)
    box = theirs.roi_heads.box_head(pooled)
    assert_same([box], [ours.roi_heads.box_head(pooled)])
    scores, deltas = theirs.roi_heads.box_predictor(box)
    our_scores, our_deltas = ours.roi_heads.box_predictor(box)
    # Matrix products of another number of rows may round differently.
    split = [scores[:, 1:], scores[:, 0], deltas[:, 4:]]
    assert_same(split, [our_scores[:, :-1], our_scores[:, -1], our_deltas], 1e-6)
    if "MODEL.MASK_ON" not in settings:
        pooled = torch.randn(3, 32, 14, 14)
        masks = theirs.roi_heads.mask_predictor(theirs.roi_heads.mask_head(pooled))
        assert_same([masks[:, 1:]], [ours.roi_heads.mask_head.layers(pooled)], 1e-6)
    assert theirs.transform.image_mean == pytest.approx([v / 255 for v in IMAGENET.pixel_mean])


@torch.no_grad()
def test_torchvision_retinanet_predicts_the_same_for_each_anchor(tmp_path):
    ours = from_yacs(RETINA)
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "torchvision")
    theirs = built(lines)
    theirs.load_state_dict(state, strict=True)
    features = ours.backbone(images(side=128))
    assert_same(theirs.backbone(images(side=128)).values(), features.values())

    outputs = theirs.head([features["p3"]])
    logits, deltas = ours.head(list(features.values()))
    n, _, height, width = features["p3"].shape
    logits, deltas = (
        x[0].view(n, 9, -1, height, width).permute(0, 3, 4, 1, 2) for x in (logits, deltas)
    )
    sizes, ratios = [32, 40, 50], [0.5, 1.0, 2.0]
    our_anchors = DefaultAnchorGenerator.generate_cell_anchors(None, sizes, ratios)
    their_anchors = theirs.anchor_generator.generate_anchors(sizes, ratios)
    order = torch.cdist(their_anchors, our_anchors).argmin(1)
    assert sorted(order.tolist()) == list(range(9)) and order.tolist() != list(range(9))
    scores = outputs["cls_logits"].view(n, height, width, 9, 6)
    boxes = outputs["bbox_regression"].view(n, height, width, 9, 4)
    assert_same([scores[..., 1:], boxes], [logits[..., order, :], deltas[..., order, :]], 1e-6)
    assert scores[..., 0].max() == -10.0  # class 0 is never predicted


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@torch.no_grad()
def test_stock_yacs_detector_computes_the_same(tmp_path, suffix):
    ours = from_yacs(SMALL, NORMED)
    out, lines = write_export(
        save(tmp_path / "x.pth", ours), "detectron2", str(tmp_path / f"y.{suffix}")
    )
    cfg = get_cfg()
    cfg.merge_from_list(SMALL)
    given = lines[lines.index("# yacs") + 1 :]
    cfg.merge_from_list([word for line in given for word in line.split(" ", 1)])
    theirs = build_model(cfg).eval()
    left = DetectionCheckpointer(theirs).load(out)
    assert left.keys() <= {"__author__", "detector", "matching_heuristics"}
    assert_same(theirs.backbone(images()).values(), ours.backbone(images()).values())
    for name, tensor in ours.state_dict().items():
        if "mask_head" not in name:
            assert torch.equal(theirs.state_dict()[name], tensor), name
    assert theirs.pixel_mean.flatten().tolist() == pytest.approx(IMAGENET.pixel_mean)


@torch.no_grad()
def test_stock_lazyconfig_detector_computes_the_same(tmp_path):
    stock = model_zoo.get_config("common/models/mask_rcnn_fpn.py")
    changed = ["model.backbone.bottom_up.stages.stride_in_1x1=False", "model.backbone.norm=BN"]
    changed += ["model.backbone.bottom_up.stem.norm=BN", "model.backbone.bottom_up.stages.norm=BN"]
    backbone = randomise(instantiate(LazyConfig.apply_overrides(stock, changed).model.backbone))
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    path = save(tmp_path / "x.pth", state, facts_of(backbone))
    out, lines = write_export(path, "detectron2")
    stock = model_zoo.get_config("common/models/mask_rcnn_fpn.py")
    given = [line for line in lines[: lines.index("# yacs")] if not line.startswith("#")]
    assert given == [
        *changed[:1],
        "model.backbone.bottom_up.stem.norm=BN",
        "model.backbone.bottom_up.stages.norm=BN",
        "model.backbone.bottom_up.stages.depth=50",
        "model.backbone.out_channels=256",
        "model.backbone.norm=BN",
    ]
    holder = nn.Module()
    holder.backbone = instantiate(LazyConfig.apply_overrides(stock, given).model.backbone).eval()
    DetectionCheckpointer(holder).load(out)
    assert_same(holder.backbone(images()).values(), backbone(images()).values())


def mmdet_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of mmdetection 3.3's Mask R-CNN R18-FPN with 4conv1fc head and BN."""
    lines = (Path(__file__).parent / "mmdet_mask_rcnn_r18.txt").read_text().splitlines()
    return {name: tuple(map(int, shape)) for name, *shape in map(str.split, lines)}


def test_mmdetection_s_names_and_shapes(tmp_path):
    ours = from_yacs(SMALL, NORMED)
    out, lines = write_export(save(tmp_path / "x.pth", ours), "mmdet")
    state = torch.load(out)["state_dict"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == mmdet_names()
    assert lines == [
        "data_preprocessor = dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], "
        "std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32)  # images are read as "
        "BGR",
        "backbone = dict(type='ResNet', depth=18, style='pytorch', norm_cfg=dict(type='SyncBN'), "
        "norm_eval=False, frozen_stages=-1)",
        "neck = dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, start_level=0, "
        "num_outs=5, norm_cfg=dict(type='SyncBN'))",
        "bbox_head = dict(type='ConvFCBBoxHead', num_shared_convs=4, num_shared_fcs=1, "
        "fc_out_channels=64, norm_cfg=dict(type='SyncBN'))  # of roi_head",
    ]


def test_group_norm_of_mmdetection_s_neck_has_its_name(tmp_path):
    ours = from_yacs(SMALL, ["MODEL.FPN.NORM", "GN"])
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "mmdet")
    assert torch.equal(state["neck.fpn_convs.0.gn.weight"], ours.backbone.fpn_output2.norm.weight)
    assert any("type='GN', num_groups=32" in line for line in lines)


@torch.no_grad()
def test_mmdetection_s_retinanet_has_its_extra_levels_and_order(tmp_path):
    ours = from_yacs(RETINA)
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "mmdet")
    assert torch.equal(state["neck.fpn_convs.3.conv.weight"], ours.backbone.top_block.p6.weight)
    assert torch.equal(state["neck.lateral_convs.0.conv.bias"], ours.backbone.fpn_lateral3.bias)
    bias = ours.head.cls_score.bias.view(9, 5)
    theirs = state["bbox_head.retina_cls.bias"].view(9, 5)
    # Anchor 1 is the first ratio of the second size there, the second ratio of the first size here.
    assert torch.equal(theirs[1], bias[3]) and torch.equal(theirs[3], bias[1])
    assert any("add_extra_convs='on_input', relu_before_extra_convs=True" in s for s in lines)


@torch.no_grad()
def test_swin_has_the_same_features_in_timm(tmp_path):
    ours = SwinTransformer(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=4)
    randomise(ours)
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "timm")
    theirs = built(lines)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["norm.weight", "norm.bias"] and not unexpected
    inputs = images(side=256)
    outputs = theirs.forward_intermediates(
        theirs.set_input_size(img_size=256) or inputs, intermediates_only=True
    )
    for i, output in enumerate(outputs):
        norm = getattr(ours, f"norm{i}")
        expected = ours(inputs)[f"p{i}"]
        actual = norm(output.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert (actual - expected).abs().max() < 2e-5 and expected.abs().max() > 0.1
    assert comments(lines, "left out") == [
        "# left out: the norms of the trunk's outputs: timm has none per stage"
    ]


@torch.no_grad()
def test_vit_has_the_same_features_in_timm(tmp_path):
    ours = ViT(
        img_size=64,
        embed_dim=64,
        depth=2,
        num_heads=1,
        pretrain_img_size=64,
        pretrain_use_cls_token=False,
        out_feature="last_feat",
    )
    randomise(ours)
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "timm")
    theirs = built(lines)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["fc_norm.weight", "fc_norm.bias"] and not unexpected
    (actual,) = theirs.forward_intermediates(
        images(), indices=1, norm=False, intermediates_only=True
    )
    expected = ours(images())["last_feat"]
    assert (actual - expected).abs().max() < 2e-5 and expected.abs().max() > 0.1


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


def test_every_pattern_of_the_rules_is_inverted():
    assert matches_of(r"a\.(?:0\.0\.)?(w|bn[13-4])") != []
    assert matches_of(r"a\.(?:0\.)?(w|b)") == ["a.0.w", "a.0.b", "a.w", "a.b"]
    assert matches_of(r"x[0-2]|y[35]") == ["x0", "x1", "x2", "y3", "y5"]
    assert matches_of(r"\d+") == [str(i) for i in range(48)]


def test_a_trunk_s_extra_tensors_are_named(tmp_path):
    model = bottlenecks()
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    state["roi_heads.mask_head.deconv.weight"] = torch.ones(2, 2, 1, 1)
    state["mask_iou.weight"] = torch.ones(2)
    path = save(tmp_path / "x.pth", state)
    _, lines = export_weights(path, "torchvision")
    assert comments(lines, "left out") == [
        "# left out: heads of a detector without FPN, such as C4: exported is torchvision's trunk",
        "# left out, no counterpart in torchvision: mask_iou.weight",
    ]


def test_class_agnostic_boxes_stay_behind(tmp_path):
    ours = from_yacs(SMALL, ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True])
    state, lines = export_weights(save(tmp_path / "x.pth", ours), "torchvision")
    assert not any("box_predictor" in name for name in state)
    assert comments(lines, "left out") == [
        "# left out: the box predictor: torchvision has boxes per class, these are class-agnostic"
    ]
    assert comments(lines, "not filled") == ["# not filled: roi_heads.box_predictor"]


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
    assert "mean = [0.406, 0.456, 0.485]  # BGR, of [0, 1]" in lines


def test_unknown_facts_are_admitted(tmp_path):
    path = save(tmp_path / "x.pth", bottlenecks(), None)
    for to in TARGETS:
        _, lines = export_weights(path, to)
        assert comments(lines, "the file does not tell the pixels' format"), to
        if to in ("torchvision", "timm", "mmdet"):
            assert comments(lines, "the file does not tell where its bottlenecks"), to


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
    with pytest.raises(UserError, match="no ResNet that mmdet could take.*use --to timm"):
        export_weights(save(tmp_path / "swin.pth", swin), "mmdet")
    with pytest.raises(UserError, match="no ResNet, Swin or ViT that timm could take"):
        export_weights(save(tmp_path / "x.pth", {"a.weight": torch.ones(1)}), "timm")
    with pytest.raises(UserError, match="no batch norm in its trunk"):
        export_weights(save(tmp_path / "gn.pth", bottlenecks(norm="GN")), "mmdet")
    with pytest.raises(UserError, match="has no model_final.pth"):
        export_weights(str(tmp_path), "timm")
