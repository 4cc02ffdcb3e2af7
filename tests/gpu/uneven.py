"""A loader for the processes of a test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from detectron2.utils import comm

from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.loader import PretrainLoader


class EmptyOnLastRank(PretrainLoader):
    """The images of the last rank have no regions."""

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[ViewBatch]:
        for batch in super().iterate(start_iter, stop_iter):
            if comm.get_rank() == comm.get_world_size() - 1:
                views = [replace(v, valid=torch.zeros_like(v.valid)) for v in batch.views]
                batch = replace(batch, views=views)
            yield batch
