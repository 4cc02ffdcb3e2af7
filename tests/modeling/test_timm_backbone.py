"""Networks of timm as backbones: the same maps, every parameter trained, errors with a fix."""

from __future__ import annotations

import copy
import sys

import pytest
import timm
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import FPN, SimpleFeaturePyramid
from omegaconf import OmegaConf
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.modeling.norms import GhostBatchNorm, use_local_batchnorm, use_sync_batchnorm
from region_pretrain.modeling.timm_backbone import TimmBackbone

SWIN = dict(img_size=64, embed_dim=24, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=4)
VIT = dict(img_size=64, embed_dim=48, depth=3, num_heads=3)
#: Name in timm -> (options of a small variant, its channels).
NETWORKS = {
    "convnext_atto": (dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), [8, 16, 24, 32]),
    "convnextv2_atto": (dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), [8, 16, 24, 32]),
    "resnet18": ({}, [64, 128, 256, 512]),
    "swin_tiny_patch4_window7_224": (SWIN, [24, 48, 96, 192]),
    "swinv2_tiny_window8_256": (SWIN, [24, 48, 96, 192]),
    "regnety_002": ({}, [24, 56, 152, 368]),
    "resnest14d": ({}, [256, 512, 1024, 2048]),
    "mvitv2_tiny": (dict(img_size=64), [96, 192, 384, 768]),
    "efficientnet_b0": ({}, [24, 40, 112, 320]),
    "vit_tiny_patch16_224": (VIT, [48]),
}
SIDE = 64


def images(batch: int = 2, size: tuple[int, int] = (SIDE, SIDE)) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_those_of_features_only(name):
    """And every parameter has a gradient, or DDP would wait for it."""
    options, channels = NETWORKS[name]
    torch.manual_seed(0)
    backbone = TimmBackbone(name, **options)
    reference = timm.create_model(
        name, features_only=True, **{k: v for k, v in backbone.arguments.items() if k != "name"}
    )
    state = {k.replace("model.", ""): v for k, v in backbone.timm.state_dict().items()}
    names = reference.state_dict()
    # FeatureListNet flattens "stages.0" to "stages_0"; FeatureGetterNet prepends "model."
    matched = {
        theirs: state[ours]
        for ours in state
        for theirs in (f"model.{ours}", ours, ours.replace(".", "_", 1))
        if theirs in names
    }
    missing = reference.load_state_dict(matched, strict=False).missing_keys
    assert missing == [] and len(matched) == len(state)
    backbone.eval(), reference.eval()
    with torch.no_grad():
        ours, theirs = backbone(images()), reference(images())
    strides = [4, 8, 16, 32] if len(channels) == 4 else [16]
    if "swin" in name:
        theirs = [m.permute(0, 3, 1, 2) for m in theirs]  # features_only is channels-last
    theirs = [m for m in theirs if SIDE // m.shape[-1] in strides][-len(strides) :]
    assert [*ours] == [f"res{s.bit_length() - 1}" for s in strides]
    for a, b, shape in zip(ours.values(), theirs, backbone.output_shape().values(), strict=True):
        assert (a - b).abs().max() == 0.0 and a.std() > 0.0
        assert (shape.channels, SIDE // shape.stride) == (a.shape[1], a.shape[2])
    assert [shape.channels for shape in backbone.output_shape().values()] == channels

    sum(m.square().sum() for m in backbone.train()(images()).values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_layers_after_the_coarsest_map_are_removed():
    options, _ = NETWORKS["convnext_atto"]
    backbone = TimmBackbone("convnext_atto", out_features=["res4", "res3"], **options)
    assert [*backbone(images())] == ["res3", "res4"] and backbone.size_divisibility == 16
    assert not any(name.startswith("timm.stages.3") for name in backbone.state_dict())
    assert all(name.startswith("timm.") for name in backbone.state_dict())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_transformers_accept_images_of_any_size(name):
    backbone = TimmBackbone(name, **NETWORKS[name][0]).eval()
    with torch.no_grad():
        maps = backbone(images(1, (96, 160)))
    assert {key: tuple(m.shape[2:]) for key, m in maps.items()} == {
        key: (96 // shape.stride, 160 // shape.stride)
        for key, shape in backbone.output_shape().items()
    }


def test_in_pyramids():
    options, _ = NETWORKS["convnext_atto"]
    lazy = L(FPN)(
        bottom_up=L(TimmBackbone)(name="convnext_atto", **options),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=16,
    )
    fpn = instantiate(lazy)  # options are OmegaConf's lists here
    assert {k: tuple(m.shape) for k, m in fpn(images()).items()} == {
        f"p{level}": (2, 16, SIDE >> level, SIDE >> level) for level in (2, 3, 4, 5)
    }
    plain = SimpleFeaturePyramid(
        TimmBackbone("vit_tiny_patch16_224", **VIT), "res4", 16, (4.0, 2.0, 1.0, 0.5)
    )
    assert [*plain(images())] == ["p2", "p3", "p4", "p5"]


def test_config_is_saved_and_read_back(tmp_path):
    options, channels = NETWORKS["convnext_atto"]
    lazy = L(TimmBackbone)(name="convnext_atto", drop_path_rate=0.1, **options)
    LazyConfig.save(OmegaConf.create({"model": lazy}), str(tmp_path / "c.yaml"))
    with on_meta_device():
        backbone = instantiate(LazyConfig.load(str(tmp_path / "c.yaml")).model)
    assert [s.channels for s in backbone.output_shape().values()] == channels
    assert backbone.timm.stem[0].weight.is_meta
    assert backbone.timm.stages[3].blocks[0].drop_path.drop_prob == pytest.approx(0.1)


def test_batch_norms():
    sync = TimmBackbone("regnety_002", norm="SyncBN")
    assert not any(type(m) is BatchNormAct2d for m in sync.modules())
    assert any(isinstance(m, nn.SyncBatchNorm) for m in sync.modules())
    plain = TimmBackbone("regnety_002")
    sync.load_state_dict(plain.state_dict())
    with torch.no_grad():
        pairs = zip(plain(images()).values(), sync(images()).values(), strict=True)
        assert all((a - b).abs().max() <= 1e-5 for a, b in pairs)
    frozen = TimmBackbone("regnety_002", norm="FrozenBN")
    assert any(isinstance(m, FrozenBatchNormAct2d) for m in frozen.modules())
    with pytest.raises(UserError, match="norm=GN must be one of BN, SyncBN, FrozenBN"):
        TimmBackbone("regnety_002", norm="GN")


@pytest.mark.parametrize("replace", [use_sync_batchnorm, use_local_batchnorm])
def test_the_norms_that_replace_synchronised_ones_keep_the_activations(replace):
    sync = TimmBackbone("regnety_002", norm="SyncBN")
    plain = TimmBackbone("regnety_002")
    plain.load_state_dict(sync.state_dict())
    names = sync.state_dict().keys()
    sync = copy.deepcopy(replace(sync))
    assert sync.state_dict().keys() == names
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in sync.modules())
    with torch.no_grad():
        pairs = zip(plain(images()).values(), sync(images()).values(), strict=True)
        assert all((a - b).abs().max() <= 1e-5 for a, b in pairs)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_ghost_batch_norms_of_timm_see_their_group_only(norm):
    plain, ghost = TimmBackbone("regnety_002"), TimmBackbone("regnety_002", norm=norm)
    ghost.load_state_dict(plain.state_dict())
    assert use_local_batchnorm(use_local_batchnorm(ghost, 2), 2) is ghost
    norms = [module for module in ghost.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 44 and {type(module) for module in norms} == {GhostBatchNorm}
    both = torch.cat([images(), images() + 1])
    with torch.no_grad():
        parts = [plain(part) for part in both.split(2)]
        found = ghost(both)
    for name, value in found.items():
        expected = torch.cat([part[name] for part in parts])
        assert (value - expected).abs().max() <= 1e-5, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="convnext_tinny"), r"has no model 'convnext_tinny'; did you mean convnext_tiny"),
        (dict(name="qqqq"), r"has no model 'qqqq'; see timm.list_models\(\)"),
        (dict(name="resnet18", out_features=["res6"]), "maps of resnet18 are res1, res2, res3"),
        (dict(name="resnet18", out_features=[]), "maps of resnet18 are res1, res2, res3"),
        (dict(name="eva02_tiny_patch14_224"), "has stride 14.*set patch_size=16 in its options"),
        (dict(name="resnet18", dephts=3), "TimmBackbone: resnet18 has no option dephts"),
    ],
)
def test_errors_name_the_fix(arguments, message):
    with on_meta_device(), pytest.raises(UserError, match=message) as error:
        TimmBackbone(**arguments)
    assert "\n" not in str(error.value)


def test_a_model_without_maps(monkeypatch):
    monkeypatch.delattr(timm.models.ResNet, "forward_intermediates")
    with (
        on_meta_device(),
        pytest.raises(UserError, match="resnet18 has no intermediate feature maps"),
    ):
        TimmBackbone("resnet18")


def test_a_model_for_one_image_size():
    backbone = TimmBackbone("mvitv2_tiny", img_size=64)
    assert backbone.padding_constraints == {"size_divisibility": 32, "square_size": 64}
    message = r"built for images of \(64, 64\) pixels, not \(64, 96\): set img_size=\[64, 96\]"
    with pytest.raises(UserError, match=message):
        backbone(images(1, (64, 96)))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'region_pretrain\[timm\]'"):
        TimmBackbone("resnet18")


@pytest.mark.parametrize("kind", ["ViT", "SwinTransformer", "MViT"])
def test_detectron2s_transformers_are_built_on_the_meta_device(kind):
    from detectron2.modeling import backbone

    options = dict(residual_block_indexes=(), window_block_indexes=()) if kind == "ViT" else {}
    with on_meta_device():
        network = getattr(backbone, kind)(drop_path_rate=0.2, **options)
    assert all(p.is_meta for p in network.parameters())
    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2) and len(rates) > 5
