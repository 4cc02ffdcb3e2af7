"""Shuffling batch norm (MoCo, arXiv 1911.05722, section 3.3).

If a batch norm sees a query's images together, and their positive keys together, a query and its
key share the statistics of the same images, which no negative does, and the network can lower the
loss through that alone. Batch norms therefore see groups of images, and the keys are embedded in
another order over the groups of all processes. Images, and the boxes that belong to them, travel to
the process that embeds them; only vectors travel back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch import distributed as dist

from region_pretrain.data.batch import View
from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.modeling.norms import number_of_groups, use_local_batchnorm


class ShufflingBatchNorm:
    """Whether and how a method shuffles the images of its key network.

    Args:
        enabled: if False, the detector's own norms (which should be SyncBN) and the images' order
            are kept.
        seed: seed of the permutations; None is 0.
        norm_batch_size: images that a batch norm sees together, at most; None: all of a process.

    Raises:
        UserError: ``norm_batch_size`` is not positive.
    """

    def __init__(self, enabled: bool, seed: int | None, norm_batch_size: int | None = None) -> None:
        if norm_batch_size is not None and norm_batch_size < 1:
            raise UserError(f"model.norm_batch_size={norm_batch_size} must be positive or null")
        self.enabled, self.seed = enabled, seed or 0
        self.norm_batch_size = norm_batch_size

    def prepare(self, network: nn.Module) -> nn.Module:
        """Give a network batch norms per group if shuffling is enabled; in place."""
        return use_local_batchnorm(network, self.norm_batch_size) if self.enabled else network

    def permutation(self, batch_size: int, *key: int) -> ImageShuffle:
        """The permutation of one pass of the key network.

        Args:
            batch_size: images per process, the same on all of them.
            key: integers that identify the pass, such as the iteration.
        """
        groups = comm.get_world_size() * number_of_groups(batch_size, self.norm_batch_size)
        shuffles = self.enabled and groups > 1
        return ImageShuffle(batch_size, (self.seed, *key) if shuffles else None)


class ImageShuffle:
    """A permutation of the images of all processes, computed by each of them without communication.

    Args:
        batch_size: images per process, the same on all of them.
        key: integers that determine the permutation, such as (seed, iteration); None keeps the
            images in order.
    """

    def __init__(self, batch_size: int, key: Sequence[int] | None) -> None:
        self.batch_size = batch_size
        self.enabled = key is not None
        self.world, self.rank = comm.get_world_size(), comm.get_rank()
        if self.enabled:
            # Position p (rank by rank) receives image order[p]; image i goes to position place[i].
            self._order = np.random.default_rng(list(key)).permutation(self.world * batch_size)
            self._place = np.argsort(self._order)

    @torch.no_grad()
    def shuffle(self, rows: Tensor) -> Tensor:
        """Send this process's rows, one per image, and receive those of its shuffled images.

        Args:
            rows: ``(B, ...)`` on the device, or small and on the CPU.

        Returns:
            ``(B, ...)`` of other images.
        """
        ones = torch.ones(self.batch_size, dtype=torch.int64)
        return self._exchange(rows, self._place, self._order, ones, ones) if self.enabled else rows

    def shuffle_view(self, view: View) -> View:
        """A view whose images and photometric parameters are shuffled, and nothing else."""
        if not self.enabled:
            return view
        return replace(
            view, images=self.shuffle(view.images), photometry=self.shuffle(view.photometry)
        )

    @torch.no_grad()
    def unshuffle(
        self, rows: Tensor, counts: Tensor | None = None, own_counts: Tensor | None = None
    ) -> Tensor:
        """Return what was computed from the shuffled images to the processes that own them.

        Args:
            rows: ``(sum(counts), ...)``: those of the first shuffled image, of the second, ...
            counts: ``(B,)`` int64 on the CPU, rows of each shuffled image; one each by default.
            own_counts: the same for this process's own images.

        Returns:
            ``(sum(own_counts), ...)``: the rows of this process's own images, in their order.
        """
        if not self.enabled:
            return rows
        ones = torch.ones(self.batch_size, dtype=torch.int64)
        counts, own_counts = (ones if c is None else c for c in (counts, own_counts))
        return self._exchange(rows, self._order, self._place, counts, own_counts)

    def _exchange(
        self,
        rows: Tensor,
        to: np.ndarray,
        origin: np.ndarray,
        counts_out: Tensor,
        counts_in: Tensor,
    ) -> Tensor:
        """Item i of the global order goes to position ``to[i]``; position p gets ``origin[p]``."""
        counts_out, counts_in = counts_out.numpy(), counts_in.numpy()
        if self.world == 1:
            return rows.index_select(0, to_device(_rows_of(counts_out, origin), rows.device))
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        to, origin = to[mine], origin[mine]
        sending = np.argsort(to)  # by receiver, then by position there
        arriving = np.argsort(origin // self.batch_size, kind="stable")  # by sender, then position
        splits_out = np.bincount(to // self.batch_size, counts_out, self.world).astype(int)
        splits_in = np.bincount(origin // self.batch_size, counts_in, self.world).astype(int)

        device = rows.device
        rows = rows.index_select(0, to_device(_rows_of(counts_out, sending), device))
        received = rows.new_empty((int(counts_in.sum()), *rows.shape[1:]))
        # NCCL takes no CPU tensors; Detectron2 keeps a gloo group for them.
        group = comm._get_global_gloo_group() if device.type == "cpu" else None
        dist.all_to_all_single(
            received, rows.contiguous(), splits_in.tolist(), splits_out.tolist(), group=group
        )
        back = _rows_of(counts_in[arriving], np.argsort(arriving))
        return received.index_select(0, to_device(back, device))


def _rows_of(counts: np.ndarray, items: np.ndarray) -> Tensor:
    """Indices of the rows of ``items``, in that order, where item i has ``counts[i]`` rows."""
    starts = np.cumsum(counts) - counts
    parts = [np.arange(starts[i], starts[i] + counts[i]) for i in items]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
