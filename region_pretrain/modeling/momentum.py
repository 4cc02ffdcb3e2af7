"""Momentum (target, key) copies of a network."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MomentumCopy(nn.ModuleDict):
    """An exponential moving average of some modules' parameters, without gradient.

    Starts as an exact copy. Buffers are not averaged: the copy's batch norms keep running
    statistics of their own, from their own forward passes in training mode.

    Args:
        modules: the online modules by name; the copies are reached by the same names.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__({name: copy.deepcopy(module) for name, module in modules.items()})
        self.requires_grad_(False)

    @torch.no_grad()
    def ema_update(self, modules: dict[str, nn.Module], momentum: float) -> None:
        """``copy = momentum * copy + (1 - momentum) * online``, in place.

        Args:
            modules: the online modules, as given to the constructor.
            momentum: in [0, 1].
        """
        mine = [p for name in modules for p in self[name].parameters()]
        online = [p for module in modules.values() for p in module.parameters()]
        torch._foreach_lerp_(mine, online, 1 - momentum)
