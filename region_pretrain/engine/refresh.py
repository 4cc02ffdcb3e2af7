"""Regions recomputed during a run with its own momentum network."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.loader import PretrainLoader
from region_pretrain.engine.feature_regions import FeatureBoxes, feature_network
from region_pretrain.engine.hooks import no_side_effects
from region_pretrain.engine.processes import fail_together, on_main_process
from region_pretrain.errors import UserError
from region_pretrain.files import NFS_SECONDS, is_local
from region_pretrain.modeling.norms import broadcast_statistics
from region_pretrain.regions import RegionStore
from region_pretrain.regions.elsewhere import FeaturesRecipe
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.parts import PLAN
from region_pretrain.regions.recipes import change, parse_id

logger = logging.getLogger(__name__)

_PART_SIZE = 1000
_PARTS = 64  # of a small data set, so that every process has some
_POLL_SECONDS = 1.0


class RefreshedLoader:
    """A pre-training loader whose regions are replaced every few epochs.

    The run consists of segments of ``refresh.epochs`` epochs. The first one uses the config's
    store. Before each further one, the processes share the images and compute their regions with
    the momentum network, and write ``<folder>/regions_epochNNN.arrow``, where NNN is the number of
    finished epochs. The engine saves a checkpoint before each refresh. A run killed before or
    during the refresh repeats it from there; one killed later in the segment finds the store.

    Everything else is the loader's.

    Args:
        loader: the loader.
        refresh: ``train.refresh_regions``.
        folder: the run's output folder, shared by all processes.

    Attributes:
        refresh_period: iterations per segment; see
            :class:`~region_pretrain.engine.build.TrainingData`.

    Raises:
        UserError: the settings are invalid, or the data has no regions.
    """

    def __init__(self, loader: Any, refresh: Mapping[str, Any], folder: str) -> None:
        if not isinstance(loader, PretrainLoader) or loader.dataset.store is None:
            raise UserError(
                "train.refresh_regions: the data has no regions to replace: name a store in "
                "dataloader.train.dataset.regions, or set train.refresh_regions.epochs=0"
            )
        if refresh["batch_size"] < 1:
            raise UserError(
                f"train.refresh_regions.batch_size={refresh['batch_size']}: must be at least 1"
            )
        if not is_local(folder):
            raise UserError(f"train.refresh_regions needs a local train.output_dir, not {folder}")
        name, changes = parse_id(refresh["recipe"])
        if name != "features-v1":
            raise UserError(f"train.refresh_regions.recipe={name}: must be features-v1")
        self._model: nn.Module | None = None
        self.refresh_period = refresh["epochs"] * loader.iterations_per_epoch
        self._loader = loader
        self._epochs, self._batch_size = refresh["epochs"], refresh["batch_size"]
        self._recipe = change(FeaturesRecipe(name), changes)
        self._folder = folder
        self._first = loader.dataset.store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def attach(self, model: nn.Module) -> None:
        """Set the model, without DDP, before the first batch.

        Raises:
            UserError: regions cannot be computed from it.
        """
        feature_network(model)
        self._model = model

    def regions_at(self, iteration: int) -> str:
        """Content hash of the store of an iteration.

        Raises:
            UserError: the store is missing.
        """
        segment = iteration // self.refresh_period
        return self._found(segment).manifest["sha256"]

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[ViewBatch]:
        """This process's batches of iterations ``start_iter`` to ``stop_iter - 1``, in order."""
        while start_iter < stop_iter:
            segment, position = divmod(start_iter, self.refresh_period)
            end = min(stop_iter, start_iter - position + self.refresh_period)
            # Loaders draw from the global generators when they start. A run that is resumed here
            # restores the generators afterwards.
            with no_side_effects(self._model):
                refreshed = position == 0 and segment > 0
                store = self._refresh(segment) if refreshed else self._found(segment)
                self._loader.dataset.store = store
                batches = self._loader.iterate(start_iter, end)
            yield from batches
            del batches  # ends its workers
            start_iter = end

    def _path(self, segment: int) -> str:
        return os.path.join(self._folder, f"regions_epoch{segment * self._epochs:03d}.arrow")

    def _found(self, segment: int) -> RegionStore:
        """The store of a segment that has begun."""
        if segment == 0:
            return self._first
        path = self._path(segment)
        if not os.path.exists(path):
            last = segment * self.refresh_period - 1
            raise UserError(
                f"{path} is missing; it contains the regions used after iteration {last}: restore "
                f"it, or remove all checkpoints after model_{last:07d}.pth to compute it again"
            )
        return RegionStore.open(path)

    def _refresh(self, segment: int) -> RegionStore:
        """Compute the store of a segment. All processes call this together."""
        path, started = self._path(segment), time.perf_counter()
        network = feature_network(self._model)
        self._model.eval()
        broadcast_statistics(network)
        boxes = FeatureBoxes(self._model, self._recipe, self._batch_size, keep_pixels=True)
        # Rounding may give the processes' weights different digests.
        recipe = on_main_process(lambda: boxes.recipe)
        records = self._loader.dataset.records()
        on_main_process(lambda: _remove_others(path, recipe.id))
        logger.info("computing the regions of %d images: %s", len(records), path)
        part_size = max(self._batch_size, min(_PART_SIZE, len(records) // _PARTS))
        with fail_together(), torch.compiler.set_stance("force_eager"):
            make_regions(
                records,
                path,
                recipe,
                workers=1,
                shard=(comm.get_rank(), comm.get_world_size()),
                part_size=part_size,
                prepare=boxes,
            )
        with fail_together():
            store = _open_soon(path)
        counts = store.counts()
        logger.info(
            "new regions after %d epochs: %.1f per image, %d images without regions; %.0f s",
            segment * self._epochs,
            counts.mean(),
            int((counts == 0).sum()),
            time.perf_counter() - started,
        )
        return store


def _open_soon(path: str) -> RegionStore:
    """Open a store that another machine has written: on NFS, it may still be missing on this one.

    Raises:
        UserError: it stays missing.
    """
    deadline = time.monotonic() + NFS_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} has been written, but {socket.gethostname()} does not see it after "
                f"{NFS_SECONDS:.0f} s: train.output_dir must be a folder that all machines share"
            )
        time.sleep(_POLL_SECONDS)
        os.listdir(os.path.dirname(path) or ".")  # makes the client read the folder again
    return RegionStore.open(path)


def _remove_others(path: str, recipe: str) -> None:
    """Remove regions of other weights: a store, or its parts, that an earlier run has left."""
    if os.path.exists(path) and RegionStore.open(path).manifest["recipe"] != recipe:
        logger.warning("%s has regions of other weights: replacing it", path)
        os.remove(path)
    folder = f"{path}.parts"
    try:
        with open(os.path.join(folder, PLAN), "rb") as file:
            same = json.load(file).get("recipe") == recipe
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
