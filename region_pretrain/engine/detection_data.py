"""Detectron2's detection batches, each a function of only the seed and the iteration.

``build_detection_train_loader`` restarts its sampler on every resume, and its mappers draw from
generators that depend on the number of workers. Here a resumed run continues with the next batch.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from region_pretrain.data.common_images import files_of
from region_pretrain.data.contents import Contents, describe_record
from region_pretrain.data.few_label import ImageSubset, write_subset
from region_pretrain.data.masks import check_masks
from region_pretrain.data.other_labels import check_other_labels
from region_pretrain.data.workers import init_worker, prefetched_bytes, share
from region_pretrain.engine.build import TrainingData, build_part
from region_pretrain.engine.processes import on_main_process
from region_pretrain.errors import UserError
from region_pretrain.images import EncodedImage, SamePixels, UnreadableImage, tolerated_files
from region_pretrain.random_state import random_state_of

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
_FILES_CHECKED = 4000
_CHECKING_THREADS = 16


class _MappedRecords(Dataset):
    """(position in the stream, record index) -> the mapped record, seeded by the position.

    An unreadable image is replaced by the next record, so that a batch remains a function of the
    seed and the position.
    """

    def __init__(
        self, records: list[dict], mapper: Callable[[dict], Any], seed: int, tolerated: int
    ) -> None:
        self._records = DatasetFromList(records)  # serialised once, shared by all workers
        self._mapper = SamePixels(mapper)
        self._seed = seed
        self._tolerated = tolerated
        self._unreadable: dict[str, str] = {}  # file -> error, in this process

    def __getitem__(self, item: tuple[int, int]) -> Any:
        position, index = item
        seed = np.random.SeedSequence((self._seed, position)).generate_state(1)[0]
        with random_state_of(int(seed)):
            for shift in range(_TRIES):  # a mapper may reject a record by returning None
                place = (index + shift) % len(self._records)
                record = self._records[place]
                try:
                    mapped = self._mapper(record)
                except UnreadableImage as error:
                    self._tolerate(record.get("file_name", str(place)), str(error))
                    continue
                if mapped is not None:
                    return mapped
        reason = "".join(f"; unreadable: {error}" for error in list(self._unreadable.values())[:1])
        raise UserError(f"dataloader.train.mapper rejected {_TRIES} records in a row{reason}")

    def _tolerate(self, file_name: str, error: str) -> None:
        if file_name in self._unreadable:
            return
        self._unreadable[file_name] = error
        if len(self._unreadable) > self._tolerated:
            some = "; ".join(list(self._unreadable.values())[:5])
            raise UserError(
                f"{len(self._unreadable)} of {len(self)} training images are unreadable, but "
                f"train.max_unreadable tolerates {self._tolerated}: {some}"
            )
        logger.warning("%s; replaced by the next image", error)

    def __len__(self) -> int:
        return len(self._records)


def check_image_files(records: Sequence[dict], key: str, tolerated: int = 0) -> None:
    """Check that files exist: those of up to 4000 records, spread evenly.

    These are local images and segmentation maps.

    Args:
        records: Detectron2's dataset dicts; those without ``file_name`` are skipped.
        key: their place in the config, e.g. ``dataloader.test``, for the error message.
        tolerated: number of missing files, of all records, that only cause a warning.

    Raises:
        UserError: more files are missing; the message names their number and the first one.
    """
    chosen = _spread(records)
    keys = ("file_name", "sem_seg_file_name")
    files = [str(record[k]) for k in keys for record in chosen if k in record]
    files = [file for file in files if "://" not in file]
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:  # a network disk answers slowly
        exists = list(pool.map(os.path.exists, files))
    missing = [file for file, found in zip(files, exists, strict=True) if not found]
    if not missing:
        return
    checked = "" if len(chosen) == len(records) else "checked "
    kind = "image files" if len(files) <= len(chosen) else "files"
    message = (
        f"{key}: {len(missing)} of {len(files)} {checked}{kind} do not exist, e.g. {missing[0]}"
    )
    if len(missing) * len(records) > tolerated * len(chosen):
        raise UserError(f"{message}: is the image folder of the data set correct?")
    logger.warning("%s", message)


def _spread(records: Sequence[dict]) -> list[dict]:
    """Up to 4000 records, spread evenly."""
    chosen = np.linspace(0, len(records) - 1, min(len(records), _FILES_CHECKED))
    return [records[i] for i in chosen.round().astype(int)]


def _check_test_images(records: Sequence[dict]) -> None:
    """Check that images are complete: up to 4000, spread evenly over the records."""

    def error_of(record: dict) -> str:
        try:
            EncodedImage.read(record["file_name"], None, record.get("reading")).check()
        except UnreadableImage as error:
            return str(error)
        return ""

    some = [record for record in _spread(records) if "file_name" in record]
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        errors = [error for error in pool.map(error_of, some) if error]
    if errors:
        raise UserError(
            f"dataloader.test: {len(errors)} of {len(some)} images cannot be evaluated: "
            f"{errors[0]}; repair them, or remove them from the data set"
        )


def _warn_of_common_files(records: Sequence[dict], trained_on: Collection[str]) -> None:
    files, others = files_of(records), set(trained_on)
    if shared := [file for file in files if file in others]:
        logger.warning(
            "dataloader.test: the training sees %d of the %d images, e.g. %s, so their AP says "
            "little about others",
            len(shared),
            len(files),
            shared[0],
        )


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
        max_unreadable: largest fraction of the images that may be unreadable, counted in each
            loader process; one is always tolerated, unless the fraction is 0.

    Attributes:
        files: the image files, see :func:`~region_pretrain.data.common_images.files_of`.

    Raises:
        UserError: there are no records, too many image files do not exist, or the processes cannot
            share the batch equally.
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
        max_unreadable: float = 0.01,
    ) -> None:
        if not records:
            raise UserError("dataloader.train.dataset is empty")
        tolerated = tolerated_files(len(records), max_unreadable, "train.max_unreadable")
        check_image_files(records, "dataloader.train", tolerated)
        self.total_batch_size = total_batch_size
        self.iterations_per_epoch = len(records) // total_batch_size
        self.files = files_of(records)
        self._num_workers = num_workers
        self._sampler = sampler or TrainingSampler(len(records), seed=seed)
        self._dataset = _MappedRecords(records, mapper, seed, tolerated)
        self._wide = np.zeros(len(records), dtype=bool)
        if aspect_ratio_grouping and all("width" in r and "height" in r for r in records):
            self._wide = np.array([r["width"] > r["height"] for r in records])

    def contents(self) -> Contents:
        """The images with their boxes and classes."""
        records = self._dataset._records
        return Contents(len(records), lambda index: describe_record(records[index], index))

    def prefetched_bytes(self) -> int:
        """Shared memory that this process's batches occupy at most, in bytes; loads one image."""
        batch = next(self._batches())
        return prefetched_bytes(lambda: self._dataset[batch[0]], len(batch), self._num_workers)

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[list[Any]]:
        """The batches of iterations ``start_iter`` to ``stop_iter`` - 1."""
        loader = DataLoader(
            self._dataset,
            batch_sampler=itertools.islice(self._batches(), start_iter, stop_iter),
            num_workers=self._num_workers,
            collate_fn=share,
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


def build_test_loader(
    cfg: DictConfig, read_images: bool = False, trained_on: Collection[str] = ()
) -> Any:
    """Instantiate a lazy test loader; its mapper, if it has one, reads as in pre-training.

    Args:
        cfg: the lazy loader.
        read_images: find images that are not complete; all processes call this together. An
            evaluation cannot replace them, and would fail after the training.
        trained_on: the training's image files (``DetectionTrainData.files``). If the test data
            have some of them, a warning is logged.

    Raises:
        UserError: the images are a part of a data set, do not exist or, with ``read_images``, are
            broken.
    """
    parts = dict(cfg.items())
    if parts.get("mapper") is None:
        return build_part(cfg, "dataloader.test")
    parts["mapper"] = SamePixels(build_part(parts["mapper"], "dataloader.test.mapper"))
    if "dataset" in parts:
        parts["dataset"] = build_part(parts["dataset"], "dataloader.test.dataset")
        if isinstance(parts["dataset"], ImageSubset):
            raise UserError(
                "dataloader.test.dataset is a part of a data set, but evaluators count the objects "
                "of all its images as missed: write these images and their boxes to a json of "
                "their own, and name it (coco://ANN.json?images=DIR)"
            )
        if isinstance(parts["dataset"], list):
            check_image_files(parts["dataset"], "dataloader.test")
            _warn_of_common_files(parts["dataset"], trained_on)
            if read_images:
                on_main_process(lambda: _check_test_images(parts["dataset"]))
    return build_part(parts, "dataloader.test")


def detection_training_data(
    cfg: DictConfig, seed: int, max_unreadable: float = 0.01, output_dir: str | None = None
) -> TrainingData:
    """Training batches for the ``dataloader.train`` of a detection config.

    Args:
        cfg: a lazy ``build_detection_train_loader``, a lazy
            :class:`~region_pretrain.engine.build.TrainingData`, or any other lazy iterable of
            batches with a field ``total_batch_size``.
        seed: determines the order, except that of an iterable.
        max_unreadable: see :class:`DetectionTrainData`; no effect on other loaders.
        output_dir: folder for the list of images of a few-label subset; None: it is not written.

    Raises:
        UserError: ``total_batch_size`` is missing, there are no images, or they lack the masks,
            keypoints or segmentation maps that the detector learns.
    """
    target = locate(cfg._target_) if isinstance(cfg._target_, str) else cfg._target_
    fields = {key for key in cfg.keys() if key == "_target_" or cfg[key] is not None}
    parts, own = dict(cfg.items()), target is build_detection_train_loader and fields <= _KNOWN
    if own or {"dataset", "mapper"} <= fields:
        records = parts["dataset"] = build_part(cfg.dataset, "dataloader.train.dataset")
        if own or isinstance(records, list):
            check_masks(records, cfg._get_root())
            check_other_labels(records, cfg._get_root())
            if output_dir is not None:
                write_subset(records, output_dir)
    if own:
        names = fields - {"_target_", "dataset"}
        options = {name: build_part(cfg[name], f"dataloader.train.{name}") for name in names}
        return DetectionTrainData(records, seed=seed, max_unreadable=max_unreadable, **options)
    if parts.get("mapper") is not None:
        parts["mapper"] = SamePixels(build_part(parts["mapper"], "dataloader.train.mapper"))
    loader = build_part(parts, "dataloader.train")
    if isinstance(loader, TrainingData):
        return loader
    if "total_batch_size" not in fields:
        raise UserError("dataloader.train needs a field total_batch_size")
    logger.warning("dataloader.train is not Detectron2's: a resumed run restarts its order")
    return _RestartingData(loader, cfg.total_batch_size)
