"""Exported weights, loaded into the libraries that they are for, give the same features."""

import re

import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg, instantiate
from detectron2.config.lazy import LazyConfig
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.modeling.backbone.vit import ViT
from export_models import (
    NORMED,
    RETINA,
    SMALL,
    assert_same,
    bottlenecks,
    built,
    comments,
    from_yacs,
    images,
    mmdet_names,
    randomise,
    save,
    trunk_features,
)
from torch import nn

from region_pretrain.convert.export import export_weights, write_export
from region_pretrain.convert.facts import IMAGENET, facts_of
from region_pretrain.errors import UserError


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@pytest.mark.parametrize("kind", ["resnet18", "bottlenecks", "resnext", "frozen"])
@torch.no_grad()
def test_trunk_has_the_same_features(tmp_path, to, kind):
    if kind == "resnet18":
        model = from_yacs(SMALL).backbone.bottom_up
    else:
        norm = "FrozenBN" if kind == "frozen" else "BN"
        model = bottlenecks(groups=2 if kind == "resnext" else 1, norm=norm)
    state, lines = export_weights(save(tmp_path / "x.pth", model), to)
    theirs = built(lines)
    theirs.load_state_dict(state, strict=True)
    assert_same(trunk_features(theirs, images()), model(images()).values())
    assert not comments(lines, "left out") + comments(lines, "not filled")


@torch.no_grad()
def test_fixed_norms_stay_fixed(tmp_path):
    model = bottlenecks(norm="FrozenBN")
    path = save(tmp_path / "x.pth", model, facts_of(model))
    state, lines = export_weights(path, "torchvision")
    theirs = built(lines).train()
    theirs.load_state_dict(state, strict=True)
    assert_same(trunk_features(theirs, images()), model.train()(images()).values(), 1e-4)
    assert comments(export_weights(path, "timm")[1], "its norms were fixed: timm.layers.freeze_ba")
    assert "norm1.weight" not in dict(theirs.named_parameters())
    (line,) = (line for line in export_weights(path, "mmdet")[1] if line.startswith("backbone"))
    assert (
        "norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True, frozen_stages=-1)" in line
    )


@torch.no_grad()
def test_the_folder_of_the_file_is_created_or_refused_before_the_export(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to the folder of --out {tmp_path}/file"):
        write_export("absent.pth", "timm", f"{tmp_path}/file/x.pth")
    with pytest.raises(UserError, match="absent.pth"):
        write_export("absent.pth", "timm", f"{tmp_path}/new/x.pth")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(UserError, match="mistyped"):
        write_export(f"{tmp_path}/mistyped/model.pth", "timm")
    assert not (tmp_path / "mistyped").exists()


def test_a_narrow_trunk_goes_to_timm_only(tmp_path):
    model = bottlenecks(widths=(16, 32, 64, 128))
    path = save(tmp_path / "x.pth", model)
    state, lines = export_weights(path, "timm")
    theirs = built(lines)
    theirs.load_state_dict(state, strict=True)
    assert_same(trunk_features(theirs, images()), model(images()).values())
    _, lines = export_weights(path, "torchvision")
    assert comments(lines, "torchvision's ResNet has no widths [16, 32, 64, 128] and stem 64")
    narrow = model.state_dict()
    narrow["stem.conv1.weight"] = narrow["stem.conv1.weight"][:24]
    _, lines = export_weights(save(tmp_path / "y.pth", narrow), "timm")
    assert comments(lines, "timm's ResNet has no stem of 24 channels: build your own")


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


@pytest.mark.parametrize("depth", [4, 2, 5])
@torch.no_grad()
def test_torchvision_retinanet_predicts_the_same_for_each_anchor(tmp_path, depth):
    ours = from_yacs(RETINA, ["MODEL.RETINANET.NUM_CONVS", depth])
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
    assert left.keys() <= {"__author__", "detector", "matching_heuristics", "sha256"}
    assert_same(theirs.backbone(images()).values(), ours.backbone(images()).values())
    for name, tensor in ours.state_dict().items():
        if "mask_head" not in name:
            assert torch.equal(theirs.state_dict()[name], tensor), name
    assert theirs.pixel_mean.flatten().tolist() == pytest.approx(IMAGENET.pixel_mean)


@torch.no_grad()
def test_another_library_s_trunk_fills_a_stock_detector(tmp_path):
    network = randomise(torchvision.models.resnet18())
    torch.save(network.state_dict(), tmp_path / "x.pth")
    out, lines = write_export(str(tmp_path / "x.pth"), "detectron2", str(tmp_path / "y.pkl"))
    assert "# a bare trunk: DetectionCheckpointer matches its names by their ends" in lines
    detector = from_yacs(SMALL)
    DetectionCheckpointer(detector).load(out)
    features = detector.backbone.bottom_up(images()).values()
    assert_same(features, trunk_features(network, images()))


def test_lines_of_a_c4_detector_include_its_res5(tmp_path):
    trunk = bottlenecks().state_dict()
    state = {
        re.sub(r"^(?=res5)", "roi_heads.", k) if k.startswith("res5") else f"backbone.{k}": v
        for k, v in trunk.items()
    }
    out, lines = write_export(save(tmp_path / "x.pth", state), "detectron2")
    assert torch.load(out)["model"].keys() == state.keys()
    assert {
        "model.backbone.stages.stride_in_1x1=False",
        "model.roi_heads.res5.stride_in_1x1=False",
        "model.roi_heads.res5.norm=BN",
    } <= set(lines)


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


def test_lines_of_a_narrow_lazyconfig_detector_are_complete(tmp_path):
    heads = "model.roi_heads"
    narrow = [
        "model.backbone.out_channels=64",
        f"{heads}.box_head.conv_dims=[48]",
        f"{heads}.box_head.fc_dims=[96]",
        "model.proposal_generator.head.in_channels=64",
        f"{heads}.box_head.input_shape.channels=64",
        f"{heads}.box_predictor.input_shape.channels=96",
        f"{heads}.mask_head.input_shape.channels=64",
    ]

    def build(overrides):
        stock = model_zoo.get_config("common/models/mask_rcnn_fpn.py")
        stock.model.backbone.bottom_up.stages.depth = 18
        del stock.model.backbone.bottom_up.stages.stride_in_1x1  # basic blocks do not have it
        return instantiate(LazyConfig.apply_overrides(stock, overrides).model)

    shapes = {name: tensor.shape for name, tensor in build(narrow).state_dict().items()}
    frozen = {name for name in shapes if ".norm." in name}  # buffers, and trained in the other
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    # A pre-trained file has neither the mask head nor the RPN.
    pretrained = {k: v for k, v in state.items() if "mask_head" not in k and "proposal" not in k}
    for tensors, left in ((state, []), (pretrained, [f"# and {narrow[-1]} if it has masks"])):
        _, lines = write_export(save(tmp_path / "x.pth", tensors), "detectron2")
        lines = lines[: lines.index("# yacs")]
        given = [line for line in lines if not line.startswith("#")]
        assert [line for line in lines if line.startswith("# and model.")] == left
        made = build([*given, *(line.split()[2] for line in left)]).named_parameters()
        assert {k: p.shape for k, p in made if k not in frozen} == {
            k: shape for k, shape in shapes.items() if k not in frozen
        }


def test_mmdetection_s_names_and_shapes(tmp_path):
    ours = from_yacs(SMALL, NORMED)
    out, lines = write_export(save(tmp_path / "x.pth", ours), "mmdet")
    state = torch.load(out)["state_dict"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == mmdet_names()
    head = ours.roi_heads.box_head
    for i in range(4):
        conv, theirs = getattr(head, f"conv{i + 1}"), f"roi_head.bbox_head.shared_convs.{i}."
        assert torch.equal(state[f"{theirs}conv.weight"], conv.weight)
        assert torch.equal(state[f"{theirs}bn.weight"], conv.norm.weight)
        conv, theirs = getattr(ours.roi_heads.mask_head, f"mask_fcn{i + 1}"), "roi_head.mask_head."
        assert torch.equal(state[f"{theirs}convs.{i}.conv.weight"], conv.weight)
    assert lines == [
        "data_preprocessor = dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], "
        "std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32)  # images are read as "
        "BGR",
        "backbone = dict(type='ResNet', depth=18, style='pytorch', norm_cfg=dict(type='SyncBN'), "
        "norm_eval=False, frozen_stages=-1)",
        "neck = dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, start_level=0, "
        "num_outs=5, norm_cfg=dict(type='SyncBN'))",
        "bbox_head = dict(type='ConvFCBBoxHead', num_shared_convs=4, num_shared_fcs=1, "
        "fc_out_channels=64, conv_out_channels=32, num_classes=5, in_channels=32, "
        "norm_cfg=dict(type='SyncBN'))  # of roi_head",
        "mask_head = dict(type='FCNMaskHead', num_convs=4, in_channels=32, conv_out_channels=32, "
        "num_classes=5, norm_cfg=dict(type='SyncBN'))  # of roi_head",
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
    for theirs, subnet in (("cls", ours.head.cls_subnet), ("reg", ours.head.bbox_subnet)):
        for i in range(4):
            weight = state[f"bbox_head.{theirs}_convs.{i}.conv.weight"]
            assert torch.equal(weight, subnet[2 * i].weight), (theirs, i)
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
