"""Detectron2's detection batches, each a function of only the seed and the iteration.

``build_detection_train_loader`` restarts its sampler on every resume, and its mappers draw from
generators that depend on the number of workers. Here a resumed run continues with the next batch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from region_pretrain.data.masks import check_masks
from region_pretrain.data.workers import init_worker
from region_pretrain.engine.build import TrainingData, build_part
from region_pretrain.engine.random_state import random_state_of
from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)

_KNOWN = {
    "_target_",
    "dataset",
    "mapper",
    "total_batch_size",
    "num_workers",
    "sampler",
    "aspect_ratio_grouping",
}
_TRIES = 100


class _MappedRecords(Dataset):
    """(position in the stream, record index) -> the mapped record, seeded by the position."""

    def __init__(self, records: list[dict], mapper: Callable[[dict], Any], seed: int) -> None:
        self._records = DatasetFromList(records)  # serialised once, shared by all workers
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Any:
        position, index = item
        seed = np.random.SeedSequence((self._seed, position)).generate_state(1)[0]
        with random_state_of(int(seed)):
            for shift in range(_TRIES):  # a mapper may reject a record by returning None
                mapped = self._mapper(self._records[(index + shift) % len(self._records)])
                if mapped is not None:
                    return mapped
        raise UserError(f"dataloader.train.mapper rejected {_TRIES} records in a row")

    def __len__(self) -> int:
        return len(self._records)


class DetectionTrainData:
    """Endless training batches of one process.

    Args:
        records: Detectron2's dataset dicts.
        mapper: converts a record to the model's input.
        total_batch_size: images per iteration, summed over all processes.
        num_workers: loader processes; their number does not change the batches.
        seed: determines the order and the mapper's random numbers.
        sampler: one of Detectron2's training samplers, seeded by its constructor; default:
            ``TrainingSampler``, which shuffles.
        aspect_ratio_grouping: put wide and tall images into different batches.

    Raises:
        UserError: there are no records, or the processes cannot share the batch equally.
    """

    def __init__(
        self,
        records: list[dict],
        mapper: Callable[[dict], Any],
        total_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        sampler: Sampler | None = None,
        aspect_ratio_grouping: bool = True,
    ) -> None:
        if not records:
            raise UserError("dataloader.train.dataset is empty")
        if total_batch_size < 1 or total_batch_size % comm.get_world_size():
            raise UserError(
                f"dataloader.train.total_batch_size={total_batch_size} must be a positive multiple "
                f"of the {comm.get_world_size()} processes"
            )
        self.total_batch_size = total_batch_size
        self.iterations_per_epoch = len(records) // total_batch_size
        self._num_workers = num_workers
        self._sampler = sampler or TrainingSampler(len(records), seed=seed)
        self._dataset = _MappedRecords(records, mapper, seed)
        self._wide = np.zeros(len(records), dtype=bool)
        if aspect_ratio_grouping and all("width" in r and "height" in r for r in records):
            self._wide = np.array([r["width"] > r["height"] for r in records])

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[list[Any]]:
        """The batches of iterations ``start_iter`` to ``stop_iter`` - 1."""
        loader = DataLoader(
            self._dataset,
            batch_sampler=itertools.islice(self._batches(), start_iter, stop_iter),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # the default would draw from the model's generator
        )
        return iter(loader)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position, record index), before anything is loaded."""
        rank, world = comm.get_rank(), comm.get_world_size()
        size = self.total_batch_size // world
        groups: tuple[list, list] = ([], [])
        for n, index in enumerate(self._sampler):
            group = groups[int(self._wide[index])]
            group.append((n * world + rank, index))
            if len(group) == size:
                yield group[:]
                group.clear()


class _RestartingData:
    """Any iterable of batches; a resumed run starts it from the beginning."""

    iterations_per_epoch = None

    def __init__(self, loader: Iterable[Any], total_batch_size: int) -> None:
        self._loader = loader
        self.total_batch_size = total_batch_size

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), stop_iter - start_iter)


def detection_training_data(cfg: DictConfig, seed: int) -> TrainingData:
    """Training batches for the ``dataloader.train`` of a detection config.

    Args:
        cfg: a lazy ``build_detection_train_loader``, a lazy
            :class:`~region_pretrain.engine.build.TrainingData`, or any other lazy iterable of
            batches with a field ``total_batch_size``.
        seed: determines the order, except that of an iterable.

    Raises:
        UserError: ``total_batch_size`` is missing, there are no images, or they lack the masks that
            the detector learns.
    """
    target = locate(cfg._target_) if isinstance(cfg._target_, str) else cfg._target_
    fields = {key for key in cfg.keys() if key == "_target_" or cfg[key] is not None}
    if target is build_detection_train_loader and fields <= _KNOWN:
        records = instantiate(cfg.dataset)
        check_masks(records, cfg._get_root())
        options = {key: instantiate(cfg[key]) for key in fields - {"_target_", "dataset"}}
        return DetectionTrainData(records, seed=seed, **options)
    if {"dataset", "mapper"} <= fields and isinstance(records := instantiate(cfg.dataset), list):
        check_masks(records, cfg._get_root())
    loader = build_part(cfg, "dataloader.train")
    if isinstance(loader, TrainingData):
        return loader
    if "total_batch_size" not in fields:
        raise UserError("dataloader.train needs a field total_batch_size")
    logger.warning("dataloader.train is not Detectron2's: a resumed run restarts its order")
    return _RestartingData(loader, cfg.total_batch_size)
