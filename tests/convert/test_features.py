"""The same image has the same features in the library that a file comes from and in Detectron2."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
import torchvision
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.modeling.backbone.vit import ViT
from torch import nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

from region_pretrain.engine.transfer import load_pretrained


class Detector(nn.Module):
    """What a detector has under the name ``backbone``."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Values that no layer has by default, statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if tensor.ndim == 1 else 0.1 * (noise - 0.5))
    return model.eval()


def image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def resnet(block, blocks: int, groups: int = 1, width: int = 64) -> ResNet:
    """Detectron2's ResNet with the strides of torchvision's."""
    bottleneck = block is BottleneckBlock
    stages, inputs = [], 64
    for i in range(4):
        outputs = (256 if bottleneck else 64) * 2**i
        more = {}
        if bottleneck:
            more = dict(
                bottleneck_channels=width * 2**i,
                num_groups=groups,
                stride_in_1x1=False,
            )
        strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(
                block,
                blocks,
                stride_per_block=strides,
                in_channels=inputs,
                out_channels=outputs,
                norm="BN",
                **more,
            )
        )
        inputs = outputs
    return ResNet(BasicStem(norm="BN"), stages, out_features=["res2", "res3", "res4", "res5"])


def torchvision_maps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        maps.append(x := layer(x))
    return maps


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "resnext"])
def test_torchvisions_resnets(tmp_path, kind):
    if kind == "basic":
        theirs = torchvision.models.resnet18(weights=None)
        ours = resnet(BasicBlock, 2)
    elif kind == "bottleneck":
        theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
        ours = resnet(BottleneckBlock, 1)
    else:
        theirs = torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4
        )
        ours = resnet(BottleneckBlock, 1, groups=32, width=128)
    path = tmp_path / "weights.pth"
    torch.save(randomise(theirs).state_dict(), path)
    load_pretrained(Detector(ours), str(path))
    with torch.no_grad():
        expected, maps = torchvision_maps(theirs, image()), ours.eval()(image())
    assert all(torch.equal(a, b) for a, b in zip(expected, maps.values(), strict=True))


def test_timms_resnet(tmp_path):
    theirs = randomise(timm.create_model("resnet18", features_only=True))
    ours = resnet(BasicBlock, 2)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    load_pretrained(Detector(ours), str(tmp_path / "weights.pth"))
    with torch.no_grad():
        expected, maps = theirs(image())[1:], ours.eval()(image())
    assert all(torch.equal(a, b) for a, b in zip(expected, maps.values(), strict=True))


@pytest.mark.parametrize("norm", ["", "BN"])
def test_torchvisions_pyramid(tmp_path, norm):
    theirs = _resnet_fpn_extractor(
        torchvision.models.resnet18(weights=None), 5, norm_layer=nn.BatchNorm2d if norm else None
    )
    ours = FPN(resnet(BasicBlock, 2), ["res2", "res3", "res4", "res5"], 256, norm=norm)
    detector = nn.Module()
    detector.backbone = randomise(theirs)
    torch.save(detector.state_dict(), tmp_path / "weights.pth")
    load_pretrained(Detector(ours), str(tmp_path / "weights.pth"))
    with torch.no_grad():
        expected, maps = theirs(image()), ours.eval()(image())
    for level in range(4):
        difference = (expected[str(level)] - maps[f"p{level + 2}"]).abs().max()
        assert difference <= 1e-5 * maps[f"p{level + 2}"].abs().max()


def swin() -> SwinTransformer:
    return SwinTransformer(
        embed_dim=96, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.0
    )


# 256 pixels: on 224 the last stage has a single window, which the libraries do not shift.
SIDE = 256


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Detectron2's maps, ``(B, C, H, W)``, end with a norm that is the identity at first."""
    return nn.functional.layer_norm(x, [x.shape[-1]]).permute(0, 3, 1, 2)


def test_torchvisions_swin(tmp_path):
    theirs = torchvision.models.SwinTransformer(
        [4, 4], 96, [2, 2, 2, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.0
    )
    ours = swin()
    torch.save(randomise(theirs).state_dict(), tmp_path / "weights.pth")
    load_pretrained(Detector(ours), str(tmp_path / "weights.pth"))
    with torch.no_grad():
        x = torch.rand(1, 3, SIDE, SIDE)
        maps = ours.eval()(x)
        for i, stage in enumerate(theirs.features):
            x = stage(x)
            if i % 2:
                assert torch.equal(normalised(x), maps[f"p{i // 2}"])


def test_timms_swin(tmp_path):
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224",
        depths=(2, 2, 2, 2),
        features_only=True,
        drop_path_rate=0.0,
    )
    ours = swin()
    state = randomise(theirs).state_dict()
    state = {k.replace("layers_", "layers."): v for k, v in state.items()}  # as in the full model
    torch.save(state, tmp_path / "weights.pth")
    load_pretrained(Detector(ours), str(tmp_path / "weights.pth"))
    x = torch.rand(1, 3, 224, 224)  # a multiple of all windows: padding is masked differently
    with torch.no_grad():
        expected, maps = theirs(x), ours.eval()(x)
    for a, b in zip(expected[:3], [*maps.values()][:3], strict=True):
        assert torch.allclose(normalised(a), b, atol=1e-5)


def vit() -> ViT:
    return ViT(
        img_size=64,
        patch_size=16,
        embed_dim=48,
        depth=2,
        num_heads=3,
        window_size=0,
        pretrain_img_size=64,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_feature="last_feat",
    )


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_vits(tmp_path, library):
    if library == "timm":
        theirs = timm.models.VisionTransformer(64, 16, embed_dim=48, depth=2, num_heads=3)
    else:
        theirs = torchvision.models.VisionTransformer(64, 16, 2, 3, 48, 192)
    ours = vit()
    torch.save(randomise(theirs).state_dict(), tmp_path / "weights.pth")
    report = load_pretrained(Detector(ours), str(tmp_path / "weights.pth"))
    assert report.missing == [] and report.mismatched == []
    # Detectron2's ViT has no class token: compare a block on the same tokens.
    tokens = torch.rand(1, 4, 4, 48)
    with torch.no_grad():
        mine = ours.eval().blocks[1](tokens).flatten(1, 2)
        block = theirs.blocks[1] if library == "timm" else theirs.encoder.layers[1]
        expected = block(tokens.flatten(1, 2))
        embedded = ours.patch_embed(image())
        patch = theirs.patch_embed.proj if library == "timm" else theirs.conv_proj
        position = theirs.pos_embed if library == "timm" else theirs.encoder.pos_embedding
    assert torch.allclose(mine, expected, atol=1e-5)
    assert torch.equal(embedded.permute(0, 3, 1, 2), patch(image()))
    assert torch.equal(ours.pos_embed, position)
