"""Large sums in slices that are recomputed in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ON_CPU = 1 << 22


def entries_at_once(device: torch.device) -> int:
    """How many entries of a float32 matrix to compute at once.

    A few tensors of this size exist while a loss is computed. On a GPU each takes 1/256 of its
    memory: 320 MiB of 80 GiB.
    """
    if device.type != "cuda":
        return _ON_CPU
    return torch.cuda.get_device_properties(device).total_memory // (256 * 4)


def recomputed_sum(part: Callable[[slice], Tensor], total: int, step: int) -> Tensor:
    """Sum a function over slices of rows, with the memory of one slice.

    If all rows fit into one slice, nothing is recomputed.

    Args:
        part: maps a slice of the rows to a scalar; deterministic.
        total: number of rows, at least 1.
        step: rows per slice; at least one row is taken.

    Returns:
        The sum of the scalars, with gradient.
    """
    step = max(step, 1)
    if step >= total:
        return part(slice(0, total))
    slices = [slice(start, min(start + step, total)) for start in range(0, total, step)]
    return torch.stack(
        [checkpoint(part, rows, use_reentrant=False, preserve_rng_state=False) for rows in slices]
    ).sum()
