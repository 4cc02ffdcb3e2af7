"""Projection and prediction heads."""

from __future__ import annotations

from functools import partial

from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from region_pretrain.errors import UserError
from region_pretrain.modeling.norms import SHARED_BATCH_NORMS


class VectorNorm(nn.Module):
    """One of Detectron2's norms applied to vectors: ``(N, C)`` as ``(N, C, 1, 1)``.

    The statistics of fewer than two vectors are meaningless: a batch norm in training that receives
    no more (a batch with a single region) normalises with its running statistics and leaves them
    unchanged.

    Args:
        norm: a name for :func:`detectron2.layers.get_norm`.
        channels: C.
        affine: False for a batch norm without scale and offset.
    """

    def __init__(self, norm: str, channels: int, affine: bool = True) -> None:
        super().__init__()
        if norm == "naiveSyncBN":
            raise UserError(
                "norm=naiveSyncBN needs as many vectors in each process: use SyncBN, which does not"
            )
        if not affine:
            norm = partial(type(get_norm(norm, channels)), affine=False)
        self.norm = get_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if len(x) < 2 and norm.training and self.is_local():
            statistics = norm.running_mean, norm.running_var
            return F.batch_norm(x, *statistics, norm.weight, norm.bias, eps=norm.eps)
        return norm(x[..., None, None]).flatten(1)

    def is_local(self) -> bool:
        """Whether the norm is a batch norm that sees this process's vectors only."""
        if isinstance(self.norm, SHARED_BATCH_NORMS) and comm.get_world_size() > 1:
            return False
        return isinstance(self.norm, nn.modules.batchnorm._BatchNorm)


class MLPHead(nn.Sequential):
    """Linear, norm, dropout, ReLU, linear: the projectors and predictors of BYOL and MoCo v2.

    Args:
        input_dim, hidden_dim, output_dim: number of channels.
        norm: a name for :func:`detectron2.layers.get_norm`; ``""`` for no norm.
        final_norm: add a batch norm without scale and offset after the last layer.
        dropout: probability of dropping a hidden channel.
        init_std: standard deviation of a normal initialisation of both weights, with zero biases;
            None for PyTorch's initialisation.

    Raises:
        UserError: ``final_norm`` with a norm that is not a batch norm.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        norm: str = "SyncBN",
        final_norm: bool = False,
        dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        if final_norm and norm not in ("BN", "SyncBN"):
            raise UserError(f"final_norm=True needs a batch norm such as SyncBN, not norm={norm!r}")
        layers: list[nn.Module] = [nn.Linear(input_dim, hidden_dim)]
        if norm:
            layers.append(VectorNorm(norm, hidden_dim))
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers += [nn.ReLU(inplace=True), nn.Linear(hidden_dim, output_dim)]
        if final_norm:
            layers.append(VectorNorm(norm, output_dim, affine=False))
        super().__init__(*layers)
        if init_std is not None:
            for linear in (layer for layer in layers if isinstance(layer, nn.Linear)):
                nn.init.normal_(linear.weight, std=init_std)
                nn.init.zeros_(linear.bias)
