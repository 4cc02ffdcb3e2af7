"""The projection head whose outputs' affinities are distilled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from region_pretrain.modeling.heads import VectorNorm


class AffinityHead(nn.Module):
    """A three-layer MLP from a feature to a unit vector, like the heads of DINO and SwAV.

    Args:
        input_dim: channels of the feature.
        hidden_dim: channels of the two hidden layers.
        output_dim: channels of the unit vector.
        norm: norm of the hidden layers, a name for :func:`detectron2.layers.get_norm`; ``""`` for
            no norm.
        prototypes: number of learnt directions that vectors are compared with; their softmax is a
            second distribution to distil. 0 switches it off.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 2048,
        output_dim: int = 256,
        norm: str = "SyncBN",
        prototypes: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(input_dim, hidden_dim)]
        for outputs in (hidden_dim, output_dim):
            layers += [VectorNorm(norm, hidden_dim)] if norm else []
            layers += [nn.ReLU(inplace=True), nn.Linear(hidden_dim, outputs)]
        self.mlp = nn.Sequential(*layers)
        for linear in (layer for layer in layers if isinstance(layer, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.prototypes = None
        if prototypes:
            self.prototypes = nn.Parameter(torch.empty(prototypes, output_dim))
            nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """``(N, C)`` to ``(N, output_dim)`` unit vectors, float32."""
        return F.normalize(self.mlp(features).float(), dim=1)

    def directions(self) -> Tensor | None:
        """``(prototypes, output_dim)`` unit vectors; None without prototypes."""
        return None if self.prototypes is None else F.normalize(self.prototypes, dim=1)
