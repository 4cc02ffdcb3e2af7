"""Gathering and averaging over processes."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from torch import Tensor
from torch import distributed as dist


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, rank by rank, without gradient.

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


def mean_over_ranks(total: Tensor, count: int | Tensor) -> Tensor:
    """The mean over the items of all processes, which may have different numbers of them.

    DDP averages gradients over processes, and the reported losses are averaged as well. If each
    process took the mean of its own items, those of a process with few would weigh more. This is
    the process's sum times ``world / (items of all processes)``, whose average over processes is
    the mean over all items. Without any item it is 0, and still connected to the graph.

    Args:
        total: sum over this process's items, of any shape.
        count: number of this process's items; a tensor on the device is not waited for.

    Returns:
        A tensor of the shape of ``total``.
    """
    world = comm.get_world_size()
    dtype = torch.promote_types(total.dtype, torch.float32)
    if isinstance(count, Tensor):
        everywhere = count.to(dtype, copy=True)
    elif world == 1:
        return total / max(count, 1)
    else:
        everywhere = torch.full((), count, dtype=dtype, device=total.device)
    if world > 1:
        dist.all_reduce(everywhere)
    return total * world / everywhere.clamp(min=1)
