"""Momentum (target, key) copies of a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn


class MomentumCopy(nn.ModuleDict):
    """An exponential moving average of some modules' parameters, without gradient.

    Starts as an exact copy. Buffers are not averaged: the copy's batch norms keep running
    statistics of their own, from their own forward passes in training mode.

    The online modules are remembered, but are not submodules of the copy: they appear neither in
    its state dict nor among its parameters.

    Args:
        online: the online modules by name; the copies have the same names.

    Raises:
        ValueError: one of them is itself a ``SyncBatchNorm``, which a run on CPUs replaces by
            another module: wrap it in ``nn.Sequential``.
    """

    def __init__(self, online: Mapping[str, nn.Module]) -> None:
        super().__init__({name: copy.deepcopy(module) for name, module in online.items()})
        for name, module in online.items():
            if isinstance(module, nn.SyncBatchNorm):
                raise ValueError(f"a momentum copy of {name}, a bare SyncBatchNorm: wrap it")
        self._online = dict(online)  # a plain dict: not registered
        self.requires_grad_(False)

    @torch.no_grad()
    def ema_update(self, momentum: float) -> None:
        """``copy = momentum * copy + (1 - momentum) * online``, in place.

        Args:
            momentum: in [0, 1].
        """
        mine = [p for name in self._online for p in self[name].parameters()]
        online = [p for module in self._online.values() for p in module.parameters()]
        torch._foreach_lerp_(mine, online, 1 - momentum)
