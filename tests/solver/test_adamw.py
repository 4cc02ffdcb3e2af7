"""AdamW's groups: layer-wise learning rates and what does not decay."""

from __future__ import annotations

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import FPN, MViT
from detectron2.modeling.backbone import SwinTransformer
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.engine.build import build_optimizer
from region_pretrain.errors import UserError
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.timm_backbone import TimmBackbone
from region_pretrain.solver import adamw_param_groups

DECAY = 0.5


class Detector(nn.Module):
    """An FPN over a trunk, and a head."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.backbone = FPN(trunk, [*trunk.output_shape()], 8)
        self.head = nn.Linear(8, 4)


def by_name(model: nn.Module, decay: float = DECAY) -> dict[str, tuple[float, float | None]]:
    """Name of each trained parameter -> learning rate at base_lr=1, weight decay if not default."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in adamw_param_groups(model, base_lr=1.0, layer_decay=decay):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr"], group.get("weight_decay"))
    return found


def test_rates_of_vitdet_are_detectron2s():
    with on_meta_device():
        model = instantiate(model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model)
    found = by_name(model, 0.7)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (rate, _) in found.items():
        assert rate == get_vit_lr_decay_rate(name, 0.7, num_layers=12), name
    assert found["backbone.net.pos_embed"] == (0.7**13, 0.0)
    assert found["backbone.net.blocks.0.attn.rel_pos_h"][1] == 0.0
    assert found["backbone.simfp_2.4.norm.weight"] == (1.0, 0.0)  # Detectron2's LayerNorm
    assert found["backbone.net.blocks.11.mlp.fc2.weight"] == (0.7, None)
    assert len(adamw_param_groups(model, 1.0, 0.7)) == 28  # 14 learning rates


SWIN = [
    ("patch_embed.proj.weight", 0, True), ("patch_embed.norm.weight", 0, False),
    ("layers.0.blocks.0.norm1.bias", 1, False), ("layers.0.blocks.1.attn.qkv.weight", 2, True),
    ("layers.0.blocks.1.attn.relative_position_bias_table", 2, False),
    ("layers.1.blocks.0.mlp.fc1.weight", 3, True), ("layers.2.blocks.0.attn.qkv.bias", 5, False),
    ("layers.3.blocks.1.mlp.fc2.weight", 8, True),
]  # fmt: skip
CASES = {
    "Detectron2's Swin": (
        lambda: SwinTransformer(depths=(2, 2, 2, 2), ape=True),
        [
            *SWIN, ("absolute_pos_embed", 0, False), ("norm3.weight", 9, False),
            ("layers.0.downsample.reduction.weight", 2, True),
            ("layers.2.downsample.norm.weight", 6, False),
        ],
        8,
    ),
    "timm's Swin": (
        lambda: TimmBackbone("swin_tiny_patch4_window7_224", depths=(2, 2, 2, 2)),
        [
            *((f"timm.{name}", layer, decays) for name, layer, decays in SWIN),
            ("timm.layers.1.downsample.reduction.weight", 2, True),
            ("timm.layers.3.downsample.norm.weight", 6, False),
        ],
        8,
    ),
    "Detectron2's MViT": (
        lambda: MViT(depth=10, last_block_indexes=(0, 2, 7, 9), use_abs_pos=True),
        [
            ("pos_embed", 0, False), ("patch_embed.proj.weight", 0, True),
            ("blocks.0.attn.qkv.weight", 1, True), ("blocks.9.attn.rel_pos_w", 10, False),
            ("blocks.3.attn.pool_q.weight", 4, True), ("scale3_norm.weight", 11, False),
        ],
        10,
    ),
    "timm's ConvNeXt": (
        lambda: TimmBackbone("convnext_atto", depths=(1, 1, 2, 1)),
        [
            ("timm.stem.0.weight", 0, True), ("timm.stem.1.weight", 0, False),
            ("timm.stages.0.blocks.0.gamma", 1, False),
            ("timm.stages.1.downsample.1.weight", 1, True),
            ("timm.stages.2.blocks.1.conv_dw.weight", 4, True),
            ("timm.stages.3.blocks.0.mlp.fc2.weight", 5, True),
        ],
        5,
    ),
    "timm's ResNet": (
        lambda: TimmBackbone("resnet18"),
        [
            ("timm.conv1.weight", 0, True), ("timm.layer1.0.bn1.weight", 1, False),
            ("timm.layer3.0.downsample.0.weight", 5, True), ("timm.layer4.1.conv2.weight", 8, True),
        ],
        8,
    ),
    "timm's RegNet": (
        lambda: TimmBackbone("regnety_002"),
        [("timm.stem.conv.weight", 0, True), ("timm.s4.b7.conv1.conv.weight", 13, True)],
        13,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_numbered_in_the_order_of_their_computation(case):
    make, expected, blocks = CASES[case]
    with on_meta_device():
        model = Detector(make())
    found = by_name(model)
    for name, layer, decays in expected:
        rate = (DECAY ** (blocks + 1 - layer), None if decays else 0.0)
        assert found[f"backbone.bottom_up.{name}"] == rate, name
    for name, (rate, _) in found.items():
        if not name.startswith("backbone.bottom_up."):  # FPN and head
            assert rate == 1.0
    assert {rate for rate, _ in found.values()} == {DECAY**i for i in range(blocks + 2)}


def test_what_decays_matches_a_restatement_from_the_modules():
    """Norms and biases are found by their modules here, tables and tokens by their names."""
    networks = {
        "vit_tiny_patch16_224": {"cls_token", "pos_embed"},
        "swinv2_tiny_window8_256": {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight"},
        "mvitv2_tiny": {"rel_pos_h", "rel_pos_w"},
        "convnextv2_atto": set(),
    }
    for name, special in networks.items():
        with on_meta_device():
            model = Detector(TimmBackbone(name))
        norms = {
            f"{module}.{own}"
            for module, norm in model.named_modules()
            if "Norm" in type(norm).__name__
            for own, _ in norm.named_parameters(recurse=False)
        }
        expected = {
            key
            for key, parameter in model.named_parameters()
            if key in norms
            or key.endswith(("bias", "gamma"))
            or any(key.endswith(end) for end in special)
        }
        found = by_name(model, 1.0)
        assert {key for key, (_, decay) in found.items() if decay == 0.0} == expected, name
        assert {rate for rate, _ in found.values()} == {1.0}


def test_of_a_pretraining_model_heads_have_factor_1_and_momentum_copies_none():
    class Pretraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Detector(TimmBackbone("convnext_atto", depths=(1, 1, 1, 1))).backbone
            self.projector = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            self.target = MomentumCopy({"backbone": self.backbone, "projector": self.projector})
            self.backbone.fpn_output2.requires_grad_(False)

    model = Pretraining()
    found = by_name(model)
    assert not any(name.startswith(("target.", "backbone.fpn_output2.")) for name in found)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    assert found["projector.0.weight"] == (1.0, None)
    assert found["projector.1.weight"] == (1.0, 0.0)
    assert found["backbone.bottom_up.timm.stem.0.weight"] == (DECAY**5, None)


def test_the_engine_scales_every_group_and_the_schedule_multiplies_them():
    with on_meta_device():
        model = Detector(TimmBackbone("convnext_atto", depths=(1, 1, 1, 1)))
    cfg = OmegaConf.create({"optimizer": get_config("common/optim.py").adamw})
    cfg.optimizer.params.layer_decay = DECAY
    optimizer = build_optimizer(cfg, model, lr=0.02)  # scaled by the engine from 1e-4
    assert cfg.optimizer.lr == 1e-4
    rates = [group["lr"] for group in optimizer.param_groups]
    assert sorted(set(rates)) == pytest.approx([0.02 * DECAY**i for i in range(5, -1, -1)])
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.1} and optimizer.defaults["betas"] == (0.9, 0.999)
    schedule = LRMultiplier(optimizer, MultiStepParamScheduler([1, 0.1], 2, [1]), 2)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.1 * rate for rate in rates]
    )


@pytest.mark.parametrize(
    ("base_lr", "scaled"), [(3e-4, 6e-4), ("${..lr}", 2e-4), ("${optimizer.lr}", 2e-4)]
)
def test_the_engine_scales_a_base_lr(base_lr, scaled):
    """It would otherwise ignore ``optimizer.lr`` and the batch size."""
    model = nn.Linear(2, 2)
    cfg = OmegaConf.create({"optimizer": get_config("common/optim.py").adamw})
    cfg.optimizer.params.base_lr = base_lr
    optimizer = build_optimizer(cfg, model, lr=2e-4)  # twice the batch size
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([scaled] * 2)
    assert cfg.optimizer.lr == 1e-4


def test_a_trunk_without_known_blocks():
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 3, 1)
    assert len(adamw_param_groups(model, 1.0)) == 2
    with pytest.raises(UserError, match="layer_decay=0.5: the backbone has no blocks.*=1"):
        adamw_param_groups(model, 1.0, 0.5)
    with pytest.raises(UserError, match=r"optimizer.params.layer_decay=1.5 must be in \(0, 1\]"):
        adamw_param_groups(model, 1.0, 1.5)


def test_a_step_is_that_of_separate_optimisers():
    """AdamW with groups equals one AdamW per parameter with its own learning rate and decay."""
    torch.manual_seed(0)
    model, other = (Detector(TimmBackbone("convnext_atto", depths=(1,) * 4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        adamw_param_groups(model, base_lr=0.1, layer_decay=DECAY), lr=0.1, weight_decay=0.3
    )
    settings = by_name(model)
    singles = [
        torch.optim.AdamW(
            [p], lr=0.1 * settings[n][0], weight_decay=0.3 if settings[n][1] is None else 0
        )
        for n, p in other.named_parameters()
    ]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    for single in singles:
        single.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)
