"""Momentum (target, key) copies of a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from region_pretrain.errors import UserError


class MomentumCopy(nn.ModuleDict):
    """An exponential moving average of some modules' parameters, without gradient.

    It starts as an exact copy, but without stochastic depth (drop path). Buffers are not averaged:
    the copy's batch norms collect their own running statistics, from their own forward passes in
    training mode.

    The copy keeps references to the online modules, but they are not its submodules: they appear
    neither in its state dict nor among its parameters.

    Args:
        online: online modules by name; their copies have the same names.
    """

    def __init__(self, online: Mapping[str, nn.Module]) -> None:
        super().__init__({name: copy.deepcopy(module) for name, module in online.items()})
        _disable_drop_path(self)
        self._online = dict(online)  # in a plain dict, so not registered as submodules
        self.requires_grad_(False)

    @torch.no_grad()
    def ema_update(self, momentum: float) -> None:
        """``copy = momentum * copy + (1 - momentum) * online``, in place.

        Args:
            momentum: in [0, 1].

        Raises:
            UserError: it is not, and the copy would diverge.
        """
        if not 0 <= momentum <= 1:
            raise UserError(f"model.momentum gives {momentum}: it must be from 0 to 1")
        mine = [p for name in self._online for p in self[name].parameters()]
        online = [p for module in self._online.values() for p in module.parameters()]
        torch._foreach_lerp_(mine, online, 1 - momentum)

    @torch.no_grad()
    def renew(self) -> None:
        """Make it an exact copy again, including buffers such as those of frozen batch norms."""
        for name, module in self._online.items():
            self[name].load_state_dict(module.state_dict())


def _disable_drop_path(model: nn.Module) -> None:
    """Set the drop rates of timm's ``DropPath``, which Detectron2 uses, and torchvision's to 0."""
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
        elif isinstance(module, StochasticDepth):
            module.p = 0.0
