"""What several processes hold, brought together."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from torch import Tensor
from torch import distributed as dist


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, by rank; without gradient.

    Args:
        rows: ``(N, ...)``, of the same shape on every process.

    Returns:
        ``(world * N, ...)``, the same on every process.
    """
    world = comm.get_world_size()
    if world == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def mean_over_ranks(total: Tensor, count: int) -> Tensor:
    """The mean over the items of all processes, where each holds some of them or none.

    Processes average their gradients, and so the losses that they report. A plain mean of each
    process's own items would give an item more weight where there are few. This is the process's
    sum times ``world / (items of all processes)``: averaged over processes it is the mean over all
    items. Where there is no item at all it is 0, connected to the graph as ``total`` is.

    Args:
        total: sum over this process's items; any shape.
        count: number of this process's items.

    Returns:
        The shape of ``total``.
    """
    world = comm.get_world_size()
    if world == 1:
        return total / max(count, 1)
    everywhere = torch.full((), count, dtype=torch.float32, device=total.device)
    dist.all_reduce(everywhere)
    return total * (world / everywhere.clamp(min=1))
