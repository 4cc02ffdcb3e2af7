"""What weights presume, and what is said if the model at hand differs."""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from torch import nn

from region_pretrain.convert.facts import (
    FAIR_GN,
    FAIR_RESNEXT,
    IMAGENET,
    MSRA,
    Facts,
    differences,
    facts_of,
)
from region_pretrain.convert.recognise import read_weights
from region_pretrain.engine.checkpoint import RunCheckpointer
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError

WIDTHS = (64, 256, 512, 1024, 2048)


def detector(stride_in_1x1: bool, rgb: bool, norm: str = "BN", groups: int = 1):
    """Detectron2's Mask R-CNN whose trunk has one bottleneck per stage."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up.stem.norm = norm
    model.backbone.bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=1,
            stride_per_block=[1 if i == 0 else 2],
            in_channels=WIDTHS[i],
            out_channels=WIDTHS[i + 1],
            bottleneck_channels=WIDTHS[i + 1] // (4 if groups == 1 else 1),
            num_groups=groups,
            stride_in_1x1=stride_in_1x1,
            norm=norm,
        )
        for i in range(4)
    ]
    if rgb:
        model.input_format = "RGB"
        model.pixel_mean = [123.675, 116.28, 103.53]
        model.pixel_std = [58.395, 57.12, 57.375]
    return instantiate(model)


def test_the_facts_of_a_detector():
    assert facts_of(detector(False, rgb=True)) == Facts(
        "RGB",
        (123.675, 116.28, 103.53),
        (58.395, 57.12, 57.375),
        False,
        "BatchNorm2d",
        res5_dilation=1,
    )
    wrapped = nn.Sequential(detector(False, rgb=True))
    assert facts_of(wrapped) == facts_of(wrapped[0])
    bgr = facts_of(detector(True, rgb=False, norm="FrozenBN"))
    mean = (103.53, 116.28, 123.675)
    assert bgr == Facts("BGR", mean, (1, 1, 1), True, "FrozenBatchNorm2d", res5_dilation=1)
    assert Facts.from_dict(bgr.to_dict() | {"new": 1}) == bgr


def test_agreeing_facts_say_nothing():
    for facts in (IMAGENET, MSRA, FAIR_RESNEXT, Facts()):
        assert differences(facts, facts) == ([], [])
        assert differences(Facts(), facts) == ([], [])


def test_differences_name_the_overrides():
    (fault,), cautions = differences(MSRA, IMAGENET)
    assert "stride in the 1x1 convolution, the detector's in the 3x3 one" in fault
    assert "MODEL.RESNETS.STRIDE_IN_1X1 True" in fault
    (caution,) = cautions
    mean = "[103.53,116.28,123.675]"
    lazy = f"model.input_format=BGR model.pixel_mean={mean} model.pixel_std=[1,1,1] and, in fine-"
    yacs = f"(yacs: INPUT.FORMAT=BGR MODEL.PIXEL_MEAN={mean} MODEL.PIXEL_STD=[1,1,1])"
    assert "it was trained on BGR images, the detector reads RGB: set " + lazy in caution
    assert caution.endswith(f"dataloader.train.mapper.image_format=BGR {yacs}")
    (caution,) = differences(IMAGENET, replace(IMAGENET, pixel_std=(1.0, 1.0, 1.0)))[1]
    assert caution.endswith(
        "model.pixel_std=[58.395,57.12,57.375] (yacs: MODEL.PIXEL_STD=[58.395,57.12,57.375])"
    )


def caffe2(groups: int = 1, kind: str = "bn") -> dict:
    """The names and layout of MSRA's R-50.pkl, with one block per stage."""
    rng = np.random.default_rng(0)

    def norm(name: str, channels: int) -> dict:
        return {f"{name}_{k}": rng.random(channels, np.float32) for k in "sb"}

    first = "res_conv1_bn" if kind == "bn" else "conv1_gn"
    blobs = {"conv1_w": rng.random((64, 3, 7, 7), np.float32), **norm(first, 64)}
    if kind == "bn":  # the bias of a convolution before a norm, which Detectron2 leaves out
        blobs["conv1_b"] = np.zeros(64, np.float32)
    for i in range(4):
        outputs = WIDTHS[i + 1]
        width = outputs // (4 if groups == 1 else 1)
        shapes = {
            "branch1": (outputs, WIDTHS[i], 1, 1),
            "branch2a": (width, WIDTHS[i], 1, 1),
            "branch2b": (width, width // groups, 3, 3),
            "branch2c": (outputs, width, 1, 1),
        }
        for branch, shape in shapes.items():
            name = f"res{i + 2}_0_{branch}"
            blobs[f"{name}_w"] = rng.random(shape, np.float32)
            blobs |= norm(f"{name}_{kind}", shape[0])
    return blobs | {"fc1000_w": rng.random((5, 2048), np.float32), "conv1_w_momentum": np.ones(1)}


@pytest.mark.parametrize("wrapped", [True, False])
def test_msras_weights_are_complete(tmp_path, wrapped):
    blobs = caffe2()
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs} if wrapped else blobs))
    model = detector(stride_in_1x1=True, rgb=False, norm="FrozenBN")
    report = load_pretrained(model, str(path))
    body = report.modules["backbone.bottom_up"]
    assert body.loaded_tensors == body.tensors == 17 * 5
    state = model.state_dict()
    name = "backbone.bottom_up.res3.0.conv2"
    assert np.array_equal(state[f"{name}.weight"].numpy(), blobs["res3_0_branch2b_w"])
    assert np.array_equal(state[f"{name}.norm.weight"].numpy(), blobs["res3_0_branch2b_bn_s"])
    assert torch.all(state[f"{name}.norm.running_mean"] == 0)
    assert torch.all(state[f"{name}.norm.running_var"] == 1 - 1e-5)


def test_folded_norms_in_trained_batch_norms_are_pointed_out(tmp_path, caplog):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(caffe2()))
    text = "its batch norms were folded into affine layers, which only FrozenBN computes"
    load_pretrained(detector(stride_in_1x1=True, rgb=False, norm="FrozenBN"), str(path))
    assert text not in caplog.text
    load_pretrained(detector(stride_in_1x1=True, rgb=False, norm="BN"), str(path))
    assert text in caplog.text


def test_fairs_group_norms_have_no_statistics(tmp_path, caplog):
    path = tmp_path / "R-50-GN.pkl"
    path.write_bytes(pickle.dumps(caffe2(kind="gn")))
    weights = read_weights(str(path))
    assert weights.facts == FAIR_GN and not weights.folded_norms
    body = load_pretrained(detector(stride_in_1x1=False, rgb=False, norm="GN"), str(path)).modules[
        "backbone.bottom_up"
    ]
    assert body.loaded_tensors == body.tensors == 17 * 3
    assert "pixel" not in caplog.text and "folded" not in caplog.text


def test_files_of_detectron2s_own_script_have_the_classifier_beside_the_stem(tmp_path, caplog):
    """``convert-torchvision-to-d2.py`` puts ``stem.`` before all names without ``layer``."""
    source = detector(stride_in_1x1=False, rgb=True).backbone.bottom_up.state_dict()
    state = {k: v.numpy() for k, v in source.items() if "num_batches" not in k}
    state |= {"stem.fc.weight": np.ones((5, 2048)), "stem.fc.bias": np.ones(5)}
    content = {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    path = tmp_path / "r50.pkl"
    path.write_bytes(pickle.dumps(content))
    assert read_weights(str(path)).facts == IMAGENET
    body = load_pretrained(detector(stride_in_1x1=False, rgb=True), str(path)).modules
    counts = body["backbone.bottom_up"]
    assert counts.loaded_tensors == counts.tensors == 17 * 5
    with pytest.raises(UserError, match="its bottlenecks have the stride in the 3x3"):
        load_pretrained(detector(stride_in_1x1=True, rgb=False), str(path))


def test_trained_detectors_of_the_model_zoo_have_anchors(tmp_path):
    source = detector(stride_in_1x1=True, rgb=False)
    state = {k: v.numpy() for k, v in source.state_dict().items()}
    for i in range(5):
        state[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = np.ones((3, 4))
    content = {"model": state, "__author__": "Detectron2 Model Zoo"}
    path = tmp_path / "model_final_f10217.pkl"
    path.write_bytes(pickle.dumps(content))
    report = load_pretrained(detector(stride_in_1x1=True, rgb=False), str(path))
    assert not report.missing and not report.unexpected


@pytest.mark.parametrize("layer", ["0.se.fc1", "0.conv2_offset", "1.conv1"])
def test_layers_of_another_trunk_are_refused(tmp_path, layer):
    """Squeeze-and-excitation, deformable convolutions, deeper stages: under torchvision's names."""
    source = detector(stride_in_1x1=False, rgb=True).backbone.bottom_up.state_dict()
    state = {}
    for name, value in source.items():
        name = re.sub(r"^stem\.", "", name)
        name = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name)
        name = name.replace("shortcut.norm", "downsample.1")
        name = re.sub(r"shortcut(?=\.w)", "downsample.0", name)
        name = re.sub(r"conv(\d)\.norm", r"bn\1", name)
        state[f"backbone.{name}"] = value
    path = tmp_path / "w.pth"
    torch.save(state, path)
    model = detector(stride_in_1x1=False, rgb=True)
    body = load_pretrained(model, str(path)).modules["backbone.bottom_up"]
    assert body.loaded_tensors == body.tensors
    state[f"backbone.layer2.{layer}.weight"] = torch.ones(512, 128, 1, 1)
    torch.save(state, path)
    message = rf"bottom_up.res3 and has others there, such as backbone\.layer2\.{layer}"
    with pytest.raises(UserError, match=message):
        load_pretrained(model, str(path))


def test_caffe2_weights_in_another_network_are_refused(tmp_path, caplog):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(caffe2()))
    with pytest.raises(UserError, match="R-50.pkl does not fit the detector: its bottlenecks have"):
        load_pretrained(detector(stride_in_1x1=False, rgb=True), str(path))
    load_pretrained(detector(stride_in_1x1=True, rgb=True), str(path))
    assert "it was trained on BGR images, the detector reads RGB" in caplog.text
    path.write_bytes(pickle.dumps(caffe2(groups=2)))
    assert read_weights(str(path)).facts == FAIR_RESNEXT


def test_a_checkpoint_of_this_library_carries_its_facts(tmp_path, caplog):
    source = detector(stride_in_1x1=False, rgb=True)
    run = {"max_iter": 1, "total_batch_size": 1, "world_size": 1}
    RunCheckpointer(source, str(tmp_path), run=run).save("model_final", iteration=0)
    path = str(tmp_path / "model_final.pth")
    assert read_weights(path).facts == facts_of(source)
    load_pretrained(detector(stride_in_1x1=False, rgb=True), path)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    load_pretrained(detector(stride_in_1x1=False, rgb=False), path)
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and "INPUT.FORMAT=RGB MODEL.PIXEL_MEAN=[123.675," in warnings[0]
    assert "MODEL.PIXEL_STD=[58.395,57.12,57.375]" in warnings[0]
    with pytest.raises(UserError, match="stride in the 3x3 convolution, the detector's in the 1x1"):
        load_pretrained(detector(stride_in_1x1=True, rgb=True), path)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "?as=keras",
            "as=keras must be one of detectron2, facebook, mmdet, release, swin, timm, ",
        ),
        ("?like=timm", "unknown option 'like'; known: as, part"),
        ("?as=mmdet", "has no names of mmdet, but e.g. conv1.weight"),
    ],
)
def test_wrong_options_are_named(tmp_path, query, message):
    torch.save(
        {"conv1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "w.pth"
    )
    with pytest.raises(UserError, match=message):
        read_weights(f"{tmp_path}/w.pth{query}")


def test_a_part_is_chosen_by_name(tmp_path):
    def state(value: float, prefix: str) -> dict:
        names = ("conv1.weight", "layer1.0.conv1.weight")
        return {prefix + name: torch.full((1,), value) for name in names}

    path = f"{tmp_path}/w.pth"
    torch.save({"student": state(1.0, "module."), "teacher": state(2.0, "")}, path)
    assert read_weights(path).tensors["stem.conv1.weight"] == 2
    assert read_weights(f"{path}?part=student").tensors["stem.conv1.weight"] == 1
    torch.save(state(3.0, "encoder_q.") | state(4.0, "encoder_k."), path)
    assert read_weights(path).tensors["stem.conv1.weight"] == 3
    assert read_weights(f"{path}?part=encoder_k").tensors["stem.conv1.weight"] == 4
    with pytest.raises(UserError, match=r"w\.pth has no part encoder_q2: neither an entry nor a"):
        read_weights(f"{path}?part=encoder_q2")
    torch.save({"model": {"backbone.res2.0.conv1.weight": torch.ones(1)}}, path)
    assert read_weights(f"{path}?part=model").tensors
    with pytest.raises(UserError, match="has no part studnet"):
        read_weights(f"{path}?part=studnet")


@pytest.mark.parametrize("name", ["resnet50_msra-5891d200.pth", "resnet50_caffe-788b5fa3.pth"])
def test_openmmlabs_copies_of_caffe2s_networks_have_its_pixels_and_strides(tmp_path, name):
    """Their tensors have torchvision's names, so only the name of the file shows it."""
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / name)
    assert read_weights(str(tmp_path / name)).facts == MSRA
    os.rename(tmp_path / name, tmp_path / "resnet50-0676ba61.pth")
    assert read_weights(str(tmp_path / "resnet50-0676ba61.pth")).facts == IMAGENET


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("faster_rcnn_r50_caffe_fpn_1x_coco_bbox_mAP-0.378_20200504.pth", MSRA),
        ("faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth", Facts()),
    ],
)
def test_openmmlabs_detectors_on_caffe2s_networks(tmp_path, name, facts):
    trunk = torchvision.models.resnet50(weights=None).state_dict()
    state = {f"backbone.{k}": v for k, v in trunk.items() if not k.startswith("fc.")}
    for level, width in enumerate((256, 512, 1024, 2048)):
        for part, channels, side in (("lateral", width, 1), ("fpn", 256, 3)):
            conv = f"neck.{part}_convs.{level}.conv"
            state[f"{conv}.weight"] = torch.zeros(256, channels, side, side)
            state[f"{conv}.bias"] = torch.zeros(256)
    torch.save({"meta": {}, "state_dict": state}, tmp_path / name)
    weights = read_weights(str(tmp_path / name))
    assert weights.facts == facts and "fpn_lateral2.weight" in weights.tensors
