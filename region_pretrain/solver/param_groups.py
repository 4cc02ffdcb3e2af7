"""Parameter groups with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def pretrain_param_groups(
    model: nn.Module, weight_decay: float, exclude_1d: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`region_pretrain.solver.lars.LARS` (or any other optimiser).

    In a config the engine supplies the model, as Detectron2's lazy training does::

        optimizer = L(LARS)(params=L(pretrain_param_groups)(weight_decay=1e-5), lr=1.0)

    Args:
        model: the model; only its parameters with ``requires_grad`` are used.
        weight_decay: L2 penalty of the decayed group.
        exclude_1d: exclude parameters of at most one dimension (BN scales and offsets, biases) from
            weight decay and LARS adaptation (BYOL, arXiv 2006.07733).

    Returns:
        One group with ``weight_decay`` and ``adapt=True``, one without both. Empty groups are
        dropped.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    excluded = [p for p in trained if exclude_1d and p.ndim <= 1]
    decayed = [p for p in trained if not (exclude_1d and p.ndim <= 1)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "adapt": True},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]
