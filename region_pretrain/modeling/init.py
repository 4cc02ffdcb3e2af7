"""Weight initialisation."""

from __future__ import annotations

from detectron2.layers import CNNBlockBase
from torch import nn


def zero_init_residual(module: nn.Module) -> None:
    """Set the scale of the last norm in each residual block of Detectron2's ResNets to zero."""
    for block in module.modules():
        if isinstance(block, CNNBlockBase):
            convs = [m for name, m in block.named_children() if name.startswith("conv")]
            norm = getattr(convs[-1], "norm", None) if convs else None
            if getattr(norm, "weight", None) is not None and hasattr(block, "shortcut"):
                nn.init.zeros_(norm.weight)
