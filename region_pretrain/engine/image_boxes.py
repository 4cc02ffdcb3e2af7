"""Runs a network over the images of records, in batches, to find their boxes."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from region_pretrain.config import load_config, num_classes_keys
from region_pretrain.errors import UserError, describe
from region_pretrain.images import UnreadableImage
from region_pretrain.regions.elsewhere.matching import GIVEN, Given
from region_pretrain.regions.generate import UNREADABLE
from region_pretrain.yacs import find_config_file, is_yacs

_READERS = 8


class ImageBoxes(ABC):
    """Adds the boxes that a network finds to records.

    Args:
        batch_size: images per batch.

    Raises:
        UserError: ``batch_size`` is less than 1.
    """

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: must be at least 1")
        self._batch_size = batch_size

    @abstractmethod
    def read(self, record: dict) -> Any:
        """The network's input for a record; called in several threads.

        Raises:
            UnreadableImage: the image cannot be read.
        """

    @abstractmethod
    def find(self, inputs: Sequence[Any]) -> list[Given]:
        """The boxes of a batch."""

    def __call__(self, records: Iterable[dict]) -> Iterator[dict]:
        """Add each image's boxes to its record, or why it is unreadable."""
        records = iter(records)
        with ThreadPoolExecutor(_READERS) as readers:
            batches = iter(lambda: list(itertools.islice(records, self._batch_size)), [])
            # The next batch is read while the network works on this one.
            waiting = [readers.map(self._read, batch) for batch in itertools.islice(batches, 2)]
            while waiting:
                read = list(waiting.pop(0))
                waiting += [readers.map(self._read, b) for b in itertools.islice(batches, 1)]
                inputs = [given for record, given in read if UNREADABLE not in record]
                with torch.no_grad():
                    found = iter(self.find(inputs) if inputs else [])
                for record, given in read:
                    bad = UNREADABLE in record
                    yield record if bad else self.result(record, given, next(found))

    def result(self, record: dict, given: Any, boxes: Given) -> dict:
        """A record with its boxes, from the network's input and output."""
        return {**record, GIVEN: boxes}

    def _read(self, record: dict) -> tuple[dict, Any]:
        """A record and the network's input; if the image is unreadable, the record says why."""
        try:
            return record, self.read(record)
        except UnreadableImage as error:
            return {**record, UNREADABLE: describe(error)}, None


def load_model_config(config: str) -> DictConfig:
    """The config of a trained model, ready to be built.

    Args:
        config: a LazyConfig, the ``config.yaml`` of a run, or Detectron2's yaml.

    Raises:
        UserError: the config cannot be loaded or leaves the number of classes open.
    """
    # A yacs config may have no test set or several, but then cannot be converted.
    other = ["DATASETS.TEST=none"] if is_yacs(find_config_file(config)) else []
    cfg = load_config(config, other)
    if unset := [key for key in num_classes_keys(cfg) if OmegaConf.select(cfg, key) is None]:
        raise UserError(f"{config}: set {unset[0]}, or give the config.yaml of the training")
    cfg.train.seed = 0
    return cfg
