"""Stochastic depth is off in momentum copies, in training mode too."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.backbone import SwinTransformer, ViT
from torch import nn
from torchvision.models import ConvNeXt
from torchvision.models.convnext import CNBlockConfig

from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.timm_backbone import TimmBackbone

RATE = 0.7


def networks() -> dict[str, nn.Module]:
    swin = dict(embed_dim=12, depths=(2, 2), num_heads=(1, 2), out_indices=(0, 1))
    vit = dict(img_size=64, embed_dim=24, depth=6, num_heads=2, residual_block_indexes=())
    blocks = [CNBlockConfig(8, 16, 3), CNBlockConfig(16, None, 3)]
    convnext = ConvNeXt(blocks, stochastic_depth_prob=RATE, layer_scale=1.0)
    return {
        "Detectron2's Swin": SwinTransformer(drop_path_rate=RATE, **swin),
        "Detectron2's ViT": ViT(drop_path_rate=RATE, window_block_indexes=(), **vit),
        "torchvision's ConvNeXt": convnext.features,
        "timm's ConvNeXt": TimmBackbone(
            "convnext_atto", drop_path_rate=RATE, depths=(2, 2, 2, 2), dims=(8, 8, 16, 16),
            ls_init_value=1.0,
        ),
        "timm's EfficientNet": TimmBackbone("efficientnet_b0", drop_path_rate=RATE),
    }  # fmt: skip


@pytest.mark.parametrize("name", networks())
@torch.no_grad()
def test_the_target_is_deterministic_and_the_online_network_is_not(name):
    torch.manual_seed(0)
    online = networks()[name].train()
    for norm in (m for m in online.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.0
    target = MomentumCopy({"backbone": online}).train()
    images = torch.rand(4, 3, 64, 64)

    def run(network: nn.Module) -> torch.Tensor:
        output = network(images)
        return [*output.values()][-1] if isinstance(output, dict) else output

    first, second = run(target["backbone"]), run(target["backbone"])
    assert (first - second).abs().max() == 0.0
    first, second = run(online), run(online)
    assert (first - second).abs().max() > 1e-3 * first.abs().max()

    rates = [vars(m).get("drop_prob", vars(m).get("p")) for m in online.modules()]
    assert max(rate for rate in rates if rate is not None) > 0.6


@torch.no_grad()
def test_the_target_computes_what_the_online_network_does_without_drop_path():
    torch.manual_seed(0)
    online = TimmBackbone("convnext_atto", drop_path_rate=RATE, depths=(2, 2, 2, 2), dims=(8,) * 4)
    target = MomentumCopy({"backbone": online}).train()
    images = torch.rand(2, 3, 64, 64)
    expected = online.eval()(images)["res5"]
    assert torch.equal(target["backbone"](images)["res5"], expected)
