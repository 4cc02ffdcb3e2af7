"""Parameter groups with their own weight decay or learning rate."""

from __future__ import annotations

import re
from typing import Any

from detectron2.solver.build import reduce_param_groups
from torch import Tensor, nn

from region_pretrain.convert.names import common_name
from region_pretrain.errors import UserError

#: A trunk's residual blocks: ``blocks.3`` of a ViT, ``layers.1.blocks.0`` of a Swin,
#: ``stages.1.blocks.0`` of a ConvNeXt, ``res2.0`` of a ResNet, ``s1.b1`` of a RegNet.
_BLOCK = re.compile(r"(?:\w+\.\d+\.)?blocks\.\d+(?:\.\d+)?(?=\.)|(?:res|layer)\d\.\d+|s\d\.b\d+")
#: What precedes the blocks of a stage, or follows them.
_IN_STAGE = re.compile(r"(?:layers|stages)\.\d+\.")
#: Parameters of more than one dimension that do not decay.
_UNDECAYED = re.compile(
    r"(?:pos_embed\w*|\w+_pos_embed|relative_position_bias_table|rel_pos\w*|\w+_token|logit_scale)$"
    r"|\.cpb_mlp\."
)


def pretrain_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for :class:`region_pretrain.solver.lars.LARS` (or any other optimiser).

    Parameters of at most one dimension (BN scales and offsets, biases) are excluded from weight
    decay and LARS adaptation (BYOL, arXiv 2006.07733).

    In a config the engine supplies the model, as Detectron2's lazy training does::

        optimizer = L(LARS)(params=L(pretrain_param_groups)(weight_decay=1e-5), lr=1.0)

    Args:
        model: the model; only its parameters with ``requires_grad`` are used.
        weight_decay: L2 penalty of the decayed group.

    Returns:
        One group with ``weight_decay`` and ``adapt=True``, one without both. Empty groups are
        dropped.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    excluded = [p for p in trained if p.ndim <= 1]
    decayed = [p for p in trained if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "adapt": True},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def adamw_param_groups(
    model: nn.Module, base_lr: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, optionally with layer-wise decay of the learning rate.

    Norms, biases, layer scales, position embeddings, tables of relative positions and class tokens
    do not decay. With ``layer_decay``, the trunk's blocks are numbered from 1 to L in the order of
    their computation, and the learning rate of block ``l`` is::

        base_lr * layer_decay ** (L + 1 - l)

    The patch embedding or stem and position embeddings have ``l = 0``, a downsampling layer the
    number of the block before it. Norms of the trunk's outputs, the feature pyramid and everything
    else, such as the heads of a detector or of a pre-training method, have ``base_lr``. For ViTs
    these are the rates of Detectron2's ``get_vit_lr_decay_rate`` (ViTDet, arXiv 2203.16527).

    In a config the engine supplies the model::

        optimizer = L(torch.optim.AdamW)(
            params=L(adamw_param_groups)(base_lr="${..lr}", layer_decay=0.7), lr=1e-4
        )

    Args:
        model: a detector or a pre-training model; only its parameters with ``requires_grad`` are
            used.
        base_lr: the optimiser's learning rate.
        layer_decay: in (0, 1]; 1 gives all layers the same learning rate.

    Returns:
        One group per learning rate, with and without ``weight_decay=0``.

    Raises:
        UserError: ``layer_decay`` is out of range, or the trunk has no blocks to number.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"optimizer.params.layer_decay={layer_decay} must be in (0, 1]")
    named = dict(model.named_parameters())
    factors = _layer_factors(named, layer_decay) if layer_decay < 1 else {}
    groups = []
    for name, parameter in named.items():
        if parameter.requires_grad:
            group = {"params": [parameter], "lr": base_lr * factors.get(name, 1.0)}
            if parameter.ndim <= 1 or _UNDECAYED.search(name):
                group["weight_decay"] = 0.0
            groups.append(group)
    return reduce_param_groups(groups)


def _layer_factors(named: dict[str, Tensor], decay: float) -> dict[str, float]:
    """Name of each parameter of the trunk's layers -> factor of its learning rate."""
    prefixes = ("backbone.bottom_up.", "backbone.net.", "backbone.")
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in named)), "backbone.")
    layers: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for name in named:
        if not name.startswith(prefix) or ".residual." in name:
            continue
        own = common_name(name)
        block = _BLOCK.match(own)
        if block:
            layers[name] = blocks.setdefault(block[0], len(blocks) + 1)
        elif not blocks or _IN_STAGE.match(own):
            layers[name] = len(blocks)
    if not blocks:
        raise UserError(
            f"optimizer.params.layer_decay={decay}: the backbone has no blocks whose names are "
            "known, so its layers cannot be numbered: set layer_decay=1"
        )
    return {name: decay ** (len(blocks) + 1 - layer) for name, layer in layers.items()}
