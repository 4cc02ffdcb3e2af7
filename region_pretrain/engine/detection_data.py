"""Detectron2's detection batches, each a function of nothing but the seed and the iteration.

``build_detection_train_loader`` starts its sampler anew on every resume, and its mappers draw from
generators that depend on the number of workers. Here a resumed run goes on with the next batch.
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
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from region_pretrain.data.workers import init_worker
from region_pretrain.engine.random_state import random_state_of
from region_pretrain.engine.run import TrainingData
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


def _as_is(batch: list[Any]) -> list[Any]:
    return batch


class _MappedRecords(Dataset):
    """(position in the stream, record) -> what the mapper makes of it, with its own seed."""

    def __init__(self, records: list[dict], mapper: Callable[[dict], Any], seed: int) -> None:
        self._records = DatasetFromList(records)  # serialised once, shared by the workers
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Any:
        position, index = item
        seed = np.random.SeedSequence((self._seed, position)).generate_state(1)[0]
        with random_state_of(int(seed)):
            for shift in range(_TRIES):  # a mapper may refuse a record with None
                mapped = self._mapper(self._records[(index + shift) % len(self._records)])
                if mapped is not None:
                    return mapped
        raise UserError(f"dataloader.train.mapper refused {_TRIES} records in a row")

    def __len__(self) -> int:
        return len(self._records)


class DetectionTrainData:
    """Endless training batches of one process.

    Args:
        records: Detectron2's dataset dicts.
        mapper: makes a model's input of a record.
        total_batch_size: images an iteration over all processes.
        num_workers: loading processes; they do not change the batches.
        seed: of the order and of the mapper.
        sampler: one of Detectron2's training samplers, with a seed of its own; shuffles by default.
        aspect_ratio_grouping: put wide and tall images into different batches.

    Raises:
        UserError: there are no records, or the batch cannot be shared among the processes.
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
            raise UserError("dataloader.train.dataset holds no image")
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
            collate_fn=_as_is,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # else starting it draws from the model's random numbers
        )
        return iter(loader)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position, record), without loading anything."""
        rank, world = comm.get_rank(), comm.get_world_size()
        size = self.total_batch_size // world
        groups: tuple[list, list] = ([], [])
        for n, index in enumerate(self._sampler):
            group = groups[int(self._wide[index])]
            group.append((n * world + rank, index))
            if len(group) == size:
                yield group[:]
                group.clear()


def detection_training_data(cfg: DictConfig, seed: int) -> TrainingData:
    """Training batches for a detection config's ``dataloader.train``.

    Args:
        cfg: a lazy ``build_detection_train_loader``, or any other lazy iterable of batches with a
            field ``total_batch_size``, whose order is then its own.
        seed: of the order.

    Returns:
        The batches.

    Raises:
        UserError: the loader does not say its batch size, or has no images.
    """
    target = locate(cfg._target_) if isinstance(cfg._target_, str) else cfg._target_
    fields = {key for key in cfg.keys() if key == "_target_" or cfg[key] is not None}
    if target is not build_detection_train_loader or not fields <= _KNOWN:
        loader = instantiate(cfg)
        if hasattr(loader, "iterate"):
            per_epoch = getattr(loader, "iterations_per_epoch", None)
            return TrainingData(loader.iterate, loader.total_batch_size, per_epoch)
        if "total_batch_size" not in fields:
            raise UserError("dataloader.train needs a field total_batch_size")
        logger.warning("dataloader.train is not Detectron2's: a resumed run starts its order anew")
        return TrainingData(_endless(loader), cfg.total_batch_size)
    options = {key: instantiate(cfg[key]) for key in fields - {"_target_", "dataset"}}
    data = DetectionTrainData(instantiate(cfg.dataset), seed=seed, **options)
    return TrainingData(data.iterate, data.total_batch_size, data.iterations_per_epoch)


def _endless(loader: Iterable[Any]) -> Callable[[int, int], Iterator[Any]]:
    def iterate(start_iter: int, stop_iter: int) -> Iterator[Any]:
        return itertools.islice(iter(loader), stop_iter - start_iter)

    return iterate
