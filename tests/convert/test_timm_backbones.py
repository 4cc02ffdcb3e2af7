"""Files of any origin fill the backbones that are timm's, and those go back to timm."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN
from detectron2.modeling.backbone import ResNet, SwinTransformer
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from export_models import built, comments, randomise
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection import retinanet_resnet50_fpn_v2

from region_pretrain.convert.export import export_weights
from region_pretrain.convert.facts import facts_of
from region_pretrain.convert.recognise import read_weights
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.modeling.timm_backbone import TimmBackbone

CONVNEXT = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
SWIN = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4))
VIT = dict(img_size=64, embed_dim=48, depth=3, num_heads=3)
NETWORKS = {
    "convnext_atto": CONVNEXT,
    "convnextv2_atto": CONVNEXT,
    "resnet18": {},
    "seresnet18": {},
    "resnet26d": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "regnety_002": {},
    "resnest14d": {},
    "mvitv2_tiny": {},
    "efficientnet_b0": {},
    "vit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,  # has layer scales
}


class Detector(nn.Module):
    """What a detector has under the name ``backbone``, and its pixels."""

    def __init__(self, trunk: nn.Module, features: tuple[str, ...] | None = None) -> None:
        super().__init__()
        features = features or tuple(trunk.output_shape())
        self.backbone = FPN(trunk, features[-3:], 8)
        self.input_format = "RGB"
        for key, value in (("pixel_mean", 123.675), ("pixel_std", 58.395)):
            self.register_buffer(key, torch.full((3, 1, 1), value), False)


def detector(name: str, **options) -> Detector:
    return Detector(TimmBackbone(name, **(options or NETWORKS[name]))).eval()


def maps(model: Detector, side: int = 64) -> list[torch.Tensor]:
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [*model.backbone.bottom_up(images).values()]


def saved(path, state: dict, prefix: str = "") -> str:
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path / "weights.pth")
    return str(path / "weights.pth")


def check_trunk_is_loaded(report, model: Detector) -> None:
    """Everything but the FPN is filled."""
    count = report.modules["backbone.bottom_up"]
    assert count.loaded_tensors == count.tensors > 20
    assert {name.split(".")[1][:4] for name in report.missing} == {"fpn_"}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_timm(tmp_path, name, prefix):
    theirs = randomise(timm.create_model(name, **NETWORKS[name])).state_dict()
    model = detector(name)
    report = load_pretrained(model, saved(tmp_path, theirs, prefix))
    check_trunk_is_loaded(report, model)
    for key, tensor in model.backbone.bottom_up.timm.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
    classifier = {key.removeprefix(prefix).split(".")[0] for key in report.unexpected}
    assert classifier <= {"fc", "head", "classifier", "norm", "norm_pre", "conv_head", "bn2"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_detectors_checkpoint_fills_it_again_and_goes_to_timm(tmp_path, name):
    model = randomise(detector(name))
    path = str(tmp_path / "model_final.pth")
    torch.save({"model": model.state_dict(), "detector": facts_of(model).to_dict()}, path)
    again = detector(name)
    report = load_pretrained(again, path)
    assert report.missing == report.unexpected == []
    ours = again.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())

    state, lines = export_weights(path, "timm")
    trunk = model.backbone.bottom_up.timm.state_dict()
    assert state.keys() == trunk.keys()
    assert all(torch.equal(tensor, trunk[key]) for key, tensor in state.items())
    assert f"timm.create_model('{name}', " in "\n".join(lines)
    theirs = built(lines)
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    not_filled = "".join(comments(lines, "not filled"))
    assert all(key.rpartition(".")[0] in not_filled for key in missing)
    assert bool(missing) == bool(not_filled)
    assert comments(lines, "left out, not exported to timm: backbone.fpn_lateral")
    with torch.no_grad():
        theirs = theirs.forward_intermediates(
            torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)),
            indices=model.backbone.bottom_up._indices,
            intermediates_only=True,
        )
    for a, b in zip(theirs, maps(model, 224), strict=True):
        assert torch.equal(a, b) and b.std() > 0


def test_torchvisions_convnext_computes_the_same(tmp_path):
    dims, depths = CONVNEXT["dims"], CONVNEXT["depths"]
    blocks = [
        CNBlockConfig(a, b, n) for a, b, n in zip(dims, (*dims[1:], None), depths, strict=True)
    ]
    theirs = randomise(torchvision.models.ConvNeXt(blocks, layer_scale=1.0))
    model = detector("convnext_tiny", **CONVNEXT)
    check_trunk_is_loaded(load_pretrained(model, saved(tmp_path, theirs.state_dict())), model)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = []
    with torch.no_grad():
        for i, stage in enumerate(theirs.features):
            images = stage(images)
            expected += [images] if i % 2 else []
    for ours, their in zip(maps(model), expected, strict=True):
        assert (ours - their).abs().max() <= 1e-5 * their.abs().max()


def facebooks_names(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """timm's name in ConvNeXt's own releases, by text replacement."""
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
    if ".mlp.grn." in name:
        part = {"weight": "gamma", "bias": "beta"}[name.rsplit(".", 1)[1]]
        return (
            re.sub(r"blocks\.(\d+)\.mlp\.grn\.\w+", rf"\1.grn.{part}", name),
            tensor[None, None, None],
        )
    for ours, theirs in (("blocks.", ""), ("mlp.fc", "pwconv"), ("conv_dw", "dwconv")):
        name = name.replace(ours, theirs)
    return name, tensor


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
def test_the_convnexts_of_their_authors(tmp_path, name):
    model, other = detector(name, **CONVNEXT), randomise(detector(name, **CONVNEXT))
    state = other.backbone.bottom_up.timm.state_dict()
    renamed = dict(facebooks_names(*item) for item in state.items())
    renamed |= {"norm.weight": torch.ones(32), "head.weight": torch.ones(3, 32)}
    path = saved(tmp_path, {"model." + key: value for key, value in renamed.items()})
    assert "dwconv" in str(renamed.keys()) and read_weights(path).title.startswith("Facebook's")
    check_trunk_is_loaded(load_pretrained(model, path), model)
    assert all(torch.equal(a, b) for a, b in zip(maps(model), maps(other), strict=True))


def test_torchvisions_swin_computes_the_same(tmp_path):
    theirs = randomise(
        torchvision.models.SwinTransformer(
            [4, 4], 24, [2, 2, 2, 2], [1, 2, 2, 4], [7, 7], stochastic_depth_prob=0.0
        )
    )
    model = detector("swin_tiny_patch4_window7_224", **SWIN)
    check_trunk_is_loaded(load_pretrained(model, saved(tmp_path, theirs.state_dict())), model)
    images = torch.rand(1, 3, 448, 448, generator=torch.Generator().manual_seed(1))
    expected = []
    with torch.no_grad():
        for i, stage in enumerate(theirs.features):
            images = stage(images)
            expected += [images.permute(0, 3, 1, 2)] if i % 2 else []
    for ours, their in zip(maps(model, 448), expected, strict=True):
        assert (ours - their).abs().max() <= 1e-4 * their.abs().max()


def test_torchvisions_vit(tmp_path):
    theirs = randomise(torchvision.models.VisionTransformer(64, 16, 3, 3, 48, 192))
    model = Detector(TimmBackbone("vit_tiny_patch16_224", **VIT), ("res4",)).eval()
    check_trunk_is_loaded(load_pretrained(model, saved(tmp_path, theirs.state_dict())), model)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = theirs._process_input(images)
        tokens = torch.cat([theirs.class_token, tokens], 1) + theirs.encoder.pos_embedding
        expected = theirs.encoder.layers(tokens)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert (maps(model)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def detectron2_resnet18() -> ResNet:
    stages = [
        ResNet.make_stage(
            BasicBlock, 2, stride_per_block=[1 if i == 0 else 2, 1], norm="BN",
            in_channels=64 * 2 ** max(i - 1, 0), out_channels=64 * 2**i,
        )
        for i in range(4)
    ]  # fmt: skip
    return ResNet(BasicStem(norm="BN"), stages, out_features=["res2", "res3", "res4", "res5"])


@pytest.mark.parametrize("direction", ["to timm's", "to Detectron2's"])
@pytest.mark.parametrize("kind", ["ResNet", "Swin"])
def test_detectron2s_network_and_timms_fill_each_other(tmp_path, kind, direction):
    if kind == "ResNet":
        stock, of_timm = Detector(detectron2_resnet18()), detector("resnet18")
    else:
        stock = Detector(SwinTransformer(drop_path_rate=0.0, **SWIN))
        of_timm = detector("swin_tiny_patch4_window7_224", **SWIN)
    source, target = (stock, of_timm) if direction == "to timm's" else (of_timm, stock)
    randomise(source), target.eval()
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    report = load_pretrained(target, str(tmp_path / "weights.pth"))
    assert [n for n in report.missing if not re.search(r"bottom_up\.norm\d\.", n)] == []
    for i, (theirs, ours) in enumerate(zip(maps(stock, 224), maps(of_timm, 224), strict=True)):
        if kind == "Swin":  # Detectron2's maps end with a norm
            norm = getattr(stock.backbone.bottom_up, f"norm{i}")
            with torch.no_grad():
                ours = norm(ours.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_moco_fills_timms_resnet(tmp_path):
    """The query encoder, not the key encoder."""
    query, key = (randomise(timm.create_model("resnet18")).state_dict() for _ in range(2))
    key = {name: tensor + 1 for name, tensor in key.items()}
    state = {f"module.encoder_k.{k}": v for k, v in key.items()}
    state |= {f"module.encoder_q.{k}": v for k, v in query.items()}
    model = detector("resnet18")
    check_trunk_is_loaded(load_pretrained(model, saved(tmp_path, state)), model)
    ours = model.backbone.bottom_up.timm.state_dict()
    assert all(torch.equal(tensor, query[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["convnext_atto", "regnety_002", "efficientnet_b0", "resnest14d"])
@pytest.mark.parametrize("change", ["a block less", "a block more", "no stage"])
def test_a_stage_is_filled_completely_or_not_at_all(tmp_path, name, change):
    state = timm.create_model(name, **NETWORKS[name]).state_dict()
    block, more, stage = {
        "convnext_atto": ("stages.2.blocks.1.", "stages.2.blocks.7.", "stages.2."),
        "regnety_002": ("s3.b2.", "s3.b9.", "s3."),
        "efficientnet_b0": ("blocks.2.1.", "blocks.2.7.", "blocks.2."),
        "resnest14d": ("layer3.0.", "layer3.7.", "layer3."),
    }[name]
    if change == "a block more":
        state |= {k.replace(block, more): v for k, v in state.items() if k.startswith(block)}
    else:
        gone = stage if change == "no stage" else block
        state = {k: v for k, v in state.items() if not k.startswith(gone)}
    with pytest.raises(UserError, match=r"of backbone\.bottom_up\.\S+ and (lacks|has others)"):
        load_pretrained(detector(name), saved(tmp_path, state))


def test_frozen_norms_fill_timms(tmp_path):
    """Which count batches, too, but that is no weight."""
    model = randomise(detector("resnet18", norm="FrozenBN"))
    path = str(tmp_path / "w.pth")
    torch.save({"model": model.state_dict(), "detector": facts_of(model).to_dict()}, path)
    state, lines = export_weights(path, "timm")
    missing = built(lines).load_state_dict(state, strict=False).missing_keys
    assert all(key.endswith(".num_batches_tracked") for key in missing)
    assert not comments(lines, "not filled")


@torch.no_grad()
def test_timms_resnet_goes_to_torchvision_too(tmp_path):
    model = randomise(detector("resnet18"))
    path = str(tmp_path / "w.pth")
    torch.save({"model": model.state_dict(), "detector": facts_of(model).to_dict()}, path)
    state, lines = export_weights(path, "torchvision")
    theirs = built([*lines, "model = backbone"]).eval()
    prefix = "backbone."
    trunk = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    theirs.load_state_dict(trunk)
    images = torch.rand(1, 3, 64, 64)
    expected = model.backbone(images)
    for name, ours in zip(("p3", "p4", "p5"), theirs(images).values(), strict=False):
        assert (ours - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
    _, lines = export_weights(path, "detectron2")
    assert comments(lines, "the trunk is a TimmBackbone")
    assert not [line for line in lines if "stages" in line or "RESNETS" in line]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnetaa50", {}, "AvgPool2d"),
        ("resnetblur50", {}, "BlurPool2d"),
        ("seresnet50", {}, "SEModule"),
        ("resnet50", {"output_stride": 16}, "dilation"),
    ],
)
@pytest.mark.parametrize("to", ["torchvision", "mmdet"])
def test_other_networks_with_the_names_of_a_resnet_are_refused(tmp_path, name, options, reason, to):
    model = detector(name, out_features=["res2", "res3", "res4"], **options)
    path = str(tmp_path / "a.pth")
    torch.save({"model": model.state_dict(), "detector": facts_of(model).to_dict()}, path)
    with pytest.raises(UserError, match=rf"timm's {name} \(.*{reason}.*\), which {to} does not"):
        export_weights(path, to)


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_detector_without_the_last_stages(tmp_path, name):
    """timm's own file has them, as a ResNet's has res5 for a C4 detector."""
    options = CONVNEXT if "convnext" in name else NETWORKS[name]
    theirs = randomise(timm.create_model(name, **options)).state_dict()
    full = detector(name, **options)
    model = detector(name, out_features=["res2", "res3"], **options)
    report = load_pretrained(model, saved(tmp_path, theirs))
    check_trunk_is_loaded(report, model)
    assert len(report.matched) < len(full.backbone.bottom_up.state_dict())
    assert any(re.match(r"(stages|layers)[._]3", key) for key in report.unexpected)


def test_other_targets_refuse_it_and_name_timm(tmp_path):
    model = detector("convnext_atto")
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no ResNet to export to mmdet.*use --to timm"):
        export_weights(str(tmp_path / "w.pth"), "mmdet")
    _, lines = export_weights(str(tmp_path / "w.pth"), "timm")
    assert comments(lines, "build the timm model that the detector has: the file lacks its name")


@torch.no_grad()
def test_torchvisions_retinanet_v2_predicts_the_same(tmp_path):
    """Its towers have group norms, and convolutions without biases."""
    theirs = randomise(
        retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4)
    )
    model = nn.Module()
    model.head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=256)], num_classes=3, num_anchors=9, norm="GN",
        conv_dims=[256] * 4,
    ).eval()  # fmt: skip
    report = load_pretrained(model, saved(tmp_path, theirs.state_dict()))
    assert report.missing == report.mismatched == []
    feature = torch.randn(1, 256, 6, 5)
    (logits,), (deltas,) = model.head([feature])
    outputs = theirs.head([feature])
    # (H * W * 9, K) with sizes and ratios swapped, and the background as class 0
    ours = logits.unflatten(1, (3, 3, -1)).transpose(1, 2).flatten(1, 3)
    ours = ours.unflatten(1, (9, 3)).permute(0, 3, 4, 1, 2).reshape(1, -1, 3)
    assert (outputs["cls_logits"][..., 1:] - ours).abs().max() <= 1e-5
    ours = deltas.unflatten(1, (3, 3, -1)).transpose(1, 2).flatten(1, 3)
    ours = ours.unflatten(1, (9, 4)).permute(0, 3, 4, 1, 2).reshape(1, -1, 4)
    assert (outputs["bbox_regression"] - ours).abs().max() <= 1e-5
