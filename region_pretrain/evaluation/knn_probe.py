"""A kNN probe of frozen region features, during a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.data.catalog import check_registered
from region_pretrain.engine.labelled_data import classes_of
from region_pretrain.errors import UserError
from region_pretrain.evaluation.accuracy import accuracy_of
from region_pretrain.evaluation.features import model_reader, read_regions, with_boxes
from region_pretrain.evaluation.knn import knn_classify
from region_pretrain.modeling.norms import broadcast_statistics

logger = logging.getLogger(__name__)


class KNNProbeHook(HookBase):
    """Logs the kNN accuracy of frozen features of ground-truth boxes during a run.

    It shows within minutes whether a pre-training learns anything. ``probe/knn_trunk`` classifies
    features of the trunk's last maps, which all methods train; ``probe/knn_fpn`` those of the
    pooled FPN maps and ``probe/knn_head`` those of the box head, if the model has them (see
    :func:`~region_pretrain.evaluation.features.model_reader`). It works with detectors and with
    pre-training models.

    A run with the probe equals one without: the probe restores all random states and modes. With
    several processes, each one processes its part of the images::

        train.hooks = [L(KNNProbeHook)(period=500, train_names="shapes_train", short_edge=None)]

    Args:
        period: in iterations; 0: only before the first step, which every new run logs as iteration
            0, and after the last step. At least ``train.log_period``.
        train_names: data sets whose boxes vote, registered or named by path.
        val_names: data sets whose boxes are classified, with the same classes; empty: each box of
            ``train_names`` is classified by all others.
        k: number of neighbours.
        max_images: use only the first images of both; None: all.
        batch_size: images per batch.
        short_edge: the detector's ``ResizeShortestEdge`` at test time, in pixels; None: no
            resizing.
        max_size: maximum length of the longer side in pixels after resizing.

    Raises:
        UserError: a number is too small.
    """

    def __init__(
        self,
        period: int,
        train_names: str | Sequence[str],
        val_names: str | Sequence[str] = (),
        k: int = 20,
        max_images: int | None = None,
        batch_size: int = 8,
        short_edge: int | None = 800,
        max_size: int = 1333,
    ) -> None:
        for name, value, least in (
            ("period", period, 0),
            ("k", k, 1),
            ("max_images", max_images, 1),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"the kNN probe has {name}={value}, which must be at least {least}")
        self._period = period
        self._names = _as_list(train_names), _as_list(val_names)
        self._k = k
        self._max_images = max_images
        self._reading = {
            "augmentations": [T.ResizeShortestEdge(short_edge, max_size)] if short_edge else [],
            "batch_size": batch_size,
        }

    def before_train(self) -> None:
        # The data sets are read first: a wrong name must not end a run at its first probe.
        names = [name for of_set in self._names for name in of_set]
        for name in names:
            check_registered(name)
        classes_of("the kNN probe's train_names and val_names", names)
        self._dicts = [self._read(names) for names in self._names if names]
        log_period = getattr(self.trainer, "log_period", 1)  # a trainer of another library
        if 0 < self._period < log_period:
            raise UserError(
                f"the kNN probe has period={self._period}, but metrics are written every "
                f"train.log_period={log_period} iterations: set one of the two to the other"
            )
        if self.trainer.start_iter == 0:
            self._log()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # Iteration 0 has the values before the first step.
        due = self._period > 0 and done % self._period == 0 and done > 1
        if due or done == self.trainer.max_iter:
            self._log()

    def _log(self) -> None:
        accuracies = self.probe(self.trainer.model)
        self.trainer.storage.put_scalars(**accuracies, smoothing_hint=False)

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Top-1 accuracies in [0, 1] by metric name, the same on all processes."""
        if isinstance(model, DistributedDataParallel):
            model = model.module
        broadcast_statistics(model)
        reader = model_reader(model)
        sets = [read_regions(model, reader, dicts, **self._reading) for dicts in self._dicts]
        result = {}
        for level in reader.levels:
            train, *val = (regions.features[level] for regions in sets)
            predicted = knn_classify(train, sets[0].labels, *val, k=self._k)
            result[f"probe/knn_{level}"] = accuracy_of(predicted, sets[-1].labels).top1
        counts = " and ".join(str(len(regions.labels)) for regions in sets)
        text = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        logger.info("kNN of %s boxes: %s", counts, text)
        return result

    def _read(self, names: list[str]) -> list[dict[str, Any]]:
        dicts = [record for name in names for record in DatasetCatalog.get(name)]
        return with_boxes(dicts, ", ".join(names))[: self._max_images]


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
