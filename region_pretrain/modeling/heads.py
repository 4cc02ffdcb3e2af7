"""Projection and prediction heads."""

from __future__ import annotations

from detectron2.layers import get_norm
from torch import Tensor, nn


class _VectorNorm(nn.Module):
    """One of Detectron2's norms on vectors: ``(N, C)`` as ``(N, C, 1, 1)``."""

    def __init__(self, norm: str, channels: int) -> None:
        super().__init__()
        self.norm = get_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[..., None, None]).flatten(1)


class MLPHead(nn.Sequential):
    """Linear, norm, ReLU, linear: the projector and predictor of the BYOL family.

    Args:
        input_dim, hidden_dim, output_dim: channels.
        norm: a name for :func:`detectron2.layers.get_norm`, ``"SyncBN"`` by default; ``""`` none.
    """

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, norm: str = "SyncBN"
    ) -> None:
        layers: list[nn.Module] = [nn.Linear(input_dim, hidden_dim)]
        if norm:
            layers.append(_VectorNorm(norm, hidden_dim))
        super().__init__(*layers, nn.ReLU(inplace=True), nn.Linear(hidden_dim, output_dim))
