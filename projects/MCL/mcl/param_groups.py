"""Which parameters LARS decays and adapts."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from region_pretrain.solver import pretrain_param_groups

# Norms that the released code's name patterns miss, as they are inside unnamed sequences.
_MISSED = re.compile(r"(^backbone\..*\.shortcut|^projector\..*|^predictors\..*)\.norm\.weight$")


def mcl_param_groups(
    model: nn.Module, weight_decay: float, released_exclusions: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`region_pretrain.solver.LARS`.

    Args:
        model: only its parameters with ``requires_grad`` are taken.
        weight_decay: L2 penalty of the decayed group.
        released_exclusions: ``False``: no parameter of at most one dimension decays or adapts.
            ``True``: the scales of the norms of ResNet's shortcuts, projector and predictors do, as
            in the released code.

    Returns:
        One group with ``weight_decay`` and ``adapt=True``, one without both.
    """
    decayed, excluded = pretrain_param_groups(model, weight_decay)
    if released_exclusions:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        missed = [p for n, p in named.items() if _MISSED.search(n)]
        ids = {id(p) for p in missed}
        decayed["params"] = decayed["params"] + missed
        excluded["params"] = [p for p in excluded["params"] if id(p) not in ids]
    return [decayed, excluded]
