"""Images dealt to other processes, so that a batch norm cannot tell which belong together.

With batch norm per process, a query and its positive key see the statistics of the same images,
and the loss can be lowered by that alone. MoCo (arXiv 1911.05722, section 3.3) therefore embeds the
keys in another order over the processes. Here, images and what goes with them (boxes) travel to
where they are embedded, and only vectors come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor
from torch import distributed as dist


class ImageShuffle:
    """A permutation of the images of all processes, known to each of them without a message.

    Args:
        batch_size: images of a process, the same on all.
        key: whole numbers that the permutation is a function of, such as (seed, iteration).
    """

    def __init__(self, batch_size: int, key: Sequence[int]) -> None:
        self.batch_size = batch_size
        self.world, self.rank = comm.get_world_size(), comm.get_rank()
        order = np.random.default_rng(list(key)).permutation(self.world * batch_size)
        # Position p (rank by rank) holds image order[p]; image i is at position place[i].
        self._order, self._place = order, np.argsort(order)

    @torch.no_grad()
    def deal(self, images: Tensor) -> Tensor:
        """Give away this process's rows, one an image, and take those dealt to it.

        Args:
            images: ``(B, ...)``, on the device, or small and on the CPU.

        Returns:
            ``(B, ...)``: of other images.
        """
        ones = np.ones(self.batch_size, np.int64)
        return self._exchange(images, self._place, self._order, ones, ones)

    @torch.no_grad()
    def collect(self, rows: Tensor, counts: Tensor, own_counts: Tensor) -> Tensor:
        """Send back what was computed of the dealt images.

        Args:
            rows: ``(sum(counts), ...)``: those of the first dealt image, of the second, ...
            counts: ``(B,)`` int64 on the CPU, rows of each dealt image.
            own_counts: ``(B,)`` int64 on the CPU, rows of each of this process's own images.

        Returns:
            ``(sum(own_counts), ...)``: those of this process's own images, in their order.
        """
        return self._exchange(rows, self._order, self._place, counts.numpy(), own_counts.numpy())

    def _exchange(
        self,
        rows: Tensor,
        to: np.ndarray,
        origin: np.ndarray,
        counts_out: np.ndarray,
        counts_in: np.ndarray,
    ) -> Tensor:
        """Item i of the global order goes to position ``to[i]``; position p gets ``origin[p]``."""
        if self.world == 1:
            return rows.index_select(0, _rows_of(counts_out, origin).to(rows.device))
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        to, origin = to[mine], origin[mine]
        sending = np.argsort(to)  # by receiver, and within it by position
        arriving = np.argsort(origin // self.batch_size, kind="stable")  # by sender, the same
        splits_out = np.bincount(to // self.batch_size, counts_out, self.world).astype(int)
        splits_in = np.bincount(origin // self.batch_size, counts_in, self.world).astype(int)

        device = rows.device
        rows = rows.index_select(0, _rows_of(counts_out, sending).to(device, non_blocking=True))
        received = rows.new_empty((int(counts_in.sum()), *rows.shape[1:]))
        # NCCL takes no CPU tensors; Detectron2 keeps a gloo group for them.
        group = comm._get_global_gloo_group() if device.type == "cpu" else None
        dist.all_to_all_single(
            received, rows.contiguous(), splits_in.tolist(), splits_out.tolist(), group=group
        )
        back = _rows_of(counts_in[arriving], np.argsort(arriving))
        return received.index_select(0, back.to(device, non_blocking=True))


def _rows_of(counts: np.ndarray, items: np.ndarray) -> Tensor:
    """Indices of the rows of ``items``, in their order, where item i has ``counts[i]`` rows."""
    starts = np.cumsum(counts) - counts
    parts = [np.arange(starts[i], starts[i] + counts[i]) for i in items]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
