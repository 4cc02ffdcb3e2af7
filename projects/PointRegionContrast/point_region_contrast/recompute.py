"""Large sums in slices that are recomputed in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed_sum(part: Callable[[slice], Tensor], total: int, step: int) -> Tensor:
    """Sum a function over slices of rows, with the memory of one slice.

    Args:
        part: maps a slice of the rows to a scalar; deterministic.
        total: number of rows, at least 1.
        step: rows per slice; at least one row is taken.

    Returns:
        The sum of the scalars, with gradient.
    """
    step = max(step, 1)
    slices = [slice(start, min(start + step, total)) for start in range(0, total, step)]
    return torch.stack(
        [checkpoint(part, rows, use_reentrant=False, preserve_rng_state=False) for rows in slices]
    ).sum()
