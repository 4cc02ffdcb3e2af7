"""Projection and prediction heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from region_pretrain.errors import UserError
from region_pretrain.modeling.norms import SHARED_BATCH_NORMS


class _VectorNorm(nn.Module):
    """One of Detectron2's norms on vectors: ``(N, C)`` as ``(N, C, 1, 1)``.

    Statistics over fewer than two vectors mean nothing: in training, a batch norm that sees no more
    than that (a batch with a single region) uses its running statistics and leaves them unchanged.
    """

    def __init__(self, norm: str, channels: int, affine: bool = True) -> None:
        super().__init__()
        if not affine:
            norm = partial(type(get_norm(norm, channels)), affine=False)
        self.norm = get_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if len(x) < 2 and norm.training and self._is_local():
            statistics = norm.running_mean, norm.running_var
            return F.batch_norm(x, *statistics, norm.weight, norm.bias, eps=norm.eps)
        return norm(x[..., None, None]).flatten(1)

    def _is_local(self) -> bool:
        """Whether the norm is a batch norm that sees this process's vectors only."""
        if isinstance(self.norm, SHARED_BATCH_NORMS) and comm.get_world_size() > 1:
            return False
        return isinstance(self.norm, nn.modules.batchnorm._BatchNorm)


class MLPHead(nn.Sequential):
    """Linear, norm, dropout, ReLU, linear: the projectors and predictors of BYOL and MoCo v2.

    Args:
        input_dim, hidden_dim, output_dim: channels.
        norm: a name for :func:`detectron2.layers.get_norm`, ``"SyncBN"`` by default; ``""`` none.
        final_norm: one more norm behind the last layer, without scale and offset.
        dropout: probability of dropping a hidden channel; 0 for none.
        init_std: of a normal initialisation of both weights, with biases of 0; None for PyTorch's.

    Raises:
        UserError: ``final_norm`` with a norm that is no batch norm.
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
        if final_norm and norm not in ("BN", "SyncBN", "naiveSyncBN"):
            raise UserError(f"final_norm=True needs a batch norm such as SyncBN, not norm={norm!r}")
        layers: list[nn.Module] = [nn.Linear(input_dim, hidden_dim)]
        if norm:
            layers.append(_VectorNorm(norm, hidden_dim))
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers += [nn.ReLU(inplace=True), nn.Linear(hidden_dim, output_dim)]
        if final_norm:
            layers.append(_VectorNorm(norm, output_dim, affine=False))
        super().__init__(*layers)
        if init_std is not None:
            for linear in (layer for layer in layers if isinstance(layer, nn.Linear)):
                nn.init.normal_(linear.weight, std=init_std)
                nn.init.zeros_(linear.bias)


class DeepMLPHead(nn.Sequential):
    """A linear layer from each width to the next, norm and ReLU between: the head of DINO or SwAV.

    Args:
        dims: channels of the input, of each hidden layer and of the output.
        norm: as for :class:`MLPHead`.
        init_std: of a truncated normal initialisation of all weights, with biases of 0; None for
            PyTorch's.

    Raises:
        UserError: fewer than two widths.
    """

    def __init__(
        self, dims: Sequence[int], norm: str = "SyncBN", init_std: float | None = None
    ) -> None:
        if len(dims) < 2:
            raise UserError(f"a head of dims={list(dims)}: those of its input and output at least")
        layers: list[nn.Module] = []
        for inputs, outputs in zip(dims[:-1], dims[1:], strict=True):
            if layers:
                if norm:
                    layers.append(_VectorNorm(norm, inputs))
                layers.append(nn.ReLU(inplace=True))
            layers.append(nn.Linear(inputs, outputs))
        super().__init__(*layers)
        if init_std is not None:
            for linear in (layer for layer in layers if isinstance(layer, nn.Linear)):
                nn.init.trunc_normal_(linear.weight, std=init_std)
                nn.init.zeros_(linear.bias)
