"""The pre-training loader: batch ``t`` is a function of (seed, t) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.contents import Contents
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.workers import init_worker, prefetched_bytes, share
from region_pretrain.errors import UserError


class _Batches(Dataset):
    """Maps an iteration number to this rank's slice of that iteration's batch."""

    def __init__(
        self, dataset: PretrainDataset, total_batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.total_batch_size = total_batch_size
        self.rank, self.world = rank, world
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def indices(self, iteration: int) -> tuple[int, list[int]]:
        """Epoch and this rank's image indices; concatenated by rank they are the global batch."""
        per_epoch = len(self.dataset) // self.total_batch_size
        epoch, position = divmod(iteration, per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._order = (epoch, order)
        size = self.total_batch_size // self.world
        start = position * self.total_batch_size + self.rank * size
        return epoch, self._order[1][start : start + size].tolist()

    def __getitem__(self, iteration: int) -> ViewBatch:
        epoch, indices = self.indices(iteration)
        return share(self.dataset.batch(self.seed, epoch, indices))


class PretrainLoader:
    """Loads batches of views on every rank.

    Each epoch is a new permutation of the images; the last, incomplete batch is dropped. The
    iteration number alone is the position in the data: a resumed run continues with the next
    sample, with any number of workers, and the global order does not depend on the number of ranks.

    Args:
        dataset: the images.
        total_batch_size: images per optimiser step over all ranks.
        num_workers: loader processes per rank; 0 loads in the training process.
        seed: seed of the order and of the samples.
        pin_memory: page-lock the batches if there is a CUDA device.

    Raises:
        UserError: fewer images than one batch.
    """

    def __init__(
        self,
        dataset: PretrainDataset,
        total_batch_size: int,
        num_workers: int = 4,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        world = comm.get_world_size()
        if len(dataset) < total_batch_size:
            raise UserError(
                f"the data set has {len(dataset)} images, fewer than one batch: lower "
                f"dataloader.train.total_batch_size (now {total_batch_size})"
            )
        self.dataset = dataset
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self._batches = _Batches(dataset, total_batch_size, seed, comm.get_rank(), world)

    @property
    def iterations_per_epoch(self) -> int:
        """Full batches per epoch."""
        return len(self.dataset) // self.total_batch_size

    def contents(self) -> Contents:
        """The images and their regions."""
        return self.dataset.contents()

    def prefetched_bytes(self) -> int:
        """Shared memory that this rank's batches occupy at most, in bytes; loads one image."""
        epoch, indices = self._batches.indices(0)
        return prefetched_bytes(
            lambda: self.dataset.batch(self._batches.seed, epoch, indices[:1]),
            len(indices),
            self.num_workers,
        )

    def first_images(self, iteration: int, count: int) -> ViewBatch:
        """The first images of this rank's batch of an iteration, loaded in this process."""
        epoch, indices = self._batches.indices(iteration)
        return self.dataset.batch(self._batches.seed, epoch, indices[:count])

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[ViewBatch]:
        """This rank's batches of iterations ``start_iter`` to ``stop_iter - 1``, in order."""
        return iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=range(start_iter, stop_iter),
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                worker_init_fn=init_worker,
            )
        )
