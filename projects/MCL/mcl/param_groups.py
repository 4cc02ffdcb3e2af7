"""Parameter groups for LARS: which parameters it decays and adapts."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from region_pretrain.solver import pretrain_param_groups

# Norms that the released code's name patterns miss because they are in unnamed nn.Sequentials.
_MISSED = re.compile(r"(^backbone\..*\.shortcut|^projector\..*|^predictors\..*)\.norm\.weight$")


def mcl_param_groups(
    model: nn.Module, weight_decay: float, released_exclusions: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`region_pretrain.solver.LARS`.

    Args:
        model: its parameters with ``requires_grad`` are grouped.
        weight_decay: L2 penalty of the decayed group.
        released_exclusions: ``False``: parameters with at most one dimension are neither decayed
            nor adapted. ``True``: as released, the norm scales in ResNet's shortcuts, the projector
            and the predictors are both.

    Returns:
        One group with ``weight_decay`` and ``adapt=True``, one without either.
    """
    decayed, excluded = pretrain_param_groups(model, weight_decay)
    if released_exclusions:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        missed = [p for n, p in named.items() if _MISSED.search(n)]
        ids = {id(p) for p in missed}
        decayed["params"] = decayed["params"] + missed
        excluded["params"] = [p for p in excluded["params"] if id(p) not in ids]
    return [decayed, excluded]
