"""Large sums in parts that are computed a second time for their gradient, and not kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed_sum(part: Callable[[slice], Tensor], total: int, step: int) -> Tensor:
    """The sum of a function over slices of some rows, with the memory of one slice.

    Args:
        part: gives a scalar for a slice of the rows, always the same for the same slice.
        total: number of rows, at least 1.
        step: rows of a slice.

    Returns:
        The sum of the scalars, with gradient.
    """
    starts = range(0, total, max(step, 1))
    return torch.stack(
        [
            checkpoint(
                part,
                slice(start, min(start + max(step, 1), total)),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for start in starts
        ]
    ).sum()
