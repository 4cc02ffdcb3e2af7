"""Weight initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.layers import CNNBlockBase
from torch import nn
from torch.overrides import TorchFunctionMode


class _RealRates(TorchFunctionMode):
    """Vision transformers read their drop-path rates from ``torch.linspace``, as numbers."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Build modules without memory for their weights, vision transformers too."""
    with torch.device("meta"), _RealRates():
        yield


def zero_init_residual(module: nn.Module) -> None:
    """Set the scale of the last norm in each residual block of Detectron2's ResNets to zero."""
    for block in module.modules():
        if isinstance(block, CNNBlockBase):
            convs = [m for name, m in block.named_children() if name.startswith("conv")]
            norm = getattr(convs[-1], "norm", None) if convs else None
            if getattr(norm, "weight", None) is not None and hasattr(block, "shortcut"):
                nn.init.zeros_(norm.weight)
