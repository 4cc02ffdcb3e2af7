"""Pictures that a run sends to its writers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from region_pretrain.data.batch import ViewBatch
from region_pretrain.engine.hooks import no_side_effects
from region_pretrain.engine.processes import fail_together
from region_pretrain.errors import UserError, describe
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.reporting import pictures

logger = logging.getLogger(__name__)

_HEIGHT = 224  # pixels of one picture

Rows = Sequence[Sequence[np.ndarray]]


class PicturesHook(HookBase):
    """Draws pictures at a fixed period, without any effect on the training.

    In pre-training:

    - ``views``: what the network receives of the first images of this iteration's batch, i.e. views
      with matched regions, montages or points;
    - ``method``: what the method draws of the first images of the run, which are always the same.

    In fine-tuning, ``detections``: the first test images, ground truth on the left.

    A picture that cannot be drawn is reported once. All processes draw the method's picture, as it
    may exchange data between them; the main one's is written.

    Args:
        period: draw every this many iterations; 0: never.
        num_images: number of images.

    Raises:
        UserError: ``num_images`` is less than 1.
    """

    def __init__(self, period: int = 0, num_images: int = 4) -> None:
        if num_images < 1:
            raise UserError(f"train.pictures.num_images={num_images}: must be at least 1")
        self.period = period
        self.num_images = num_images
        self._batch: ViewBatch | None = None
        self._records: list[dict[str, Any]] | None = None
        self._truth: list[np.ndarray] = []
        self._given_up: set[str] = set()

    def after_step(self) -> None:
        if not self.period or (self.trainer.iter + 1) % self.period:
            return
        module = self.trainer.module
        with no_side_effects(self.trainer.model):
            if not isinstance(module, PretrainingModel):
                if comm.is_main_process() and "test" in self.trainer.cfg.dataloader:
                    self._put("detections", self._detections)
            elif hasattr(self.trainer.loader, "first_images"):
                if comm.is_main_process():
                    self._put("views", self._views)
                self._put("method", self._method)

    def _put(self, name: str, draw: Callable[[], Rows | None]) -> None:
        if name in self._given_up:
            return
        try:
            rows = draw()
            # The others draw the method's picture again only if the main process does.
            with fail_together() if name == "method" else nullcontext():
                sheet = pictures.sheet(rows, _HEIGHT) if rows and comm.is_main_process() else None
        except Exception as error:  # raised by any data set, sampler or model
            self._given_up.add(name)
            logger.warning(
                "no pictures of %s: %s. The training continues without them", name, describe(error)
            )
            logger.debug("traceback of the failed picture:", exc_info=True)
            return
        if rows is None:
            self._given_up.add(name)
        elif sheet is not None:
            image = torch.from_numpy(sheet).permute(2, 0, 1)
            self.trainer.storage.put_image(f"pictures/{name}", image)

    def _views(self) -> Rows:
        batch = self.trainer.loader.first_images(self.trainer.iter, self.num_images)
        return pictures.pictures(self.trainer.cfg, batch)

    @torch.no_grad()
    def _method(self) -> Rows | None:
        with fail_together():
            if self._batch is None:
                self._batch = self.trainer.loader.first_images(0, self.num_images)
        with fail_together():
            return self.trainer.module.eval().pictures(self._batch.to(self.trainer.device))

    @torch.no_grad()
    def _detections(self) -> Rows:
        cfg, detector = self.trainer.cfg, self.trainer.module.eval()
        if self._records is None:
            self._records = pictures.first_records(cfg, self.num_images)
            self._truth = pictures.ground_truth_pictures(cfg, self._records)
        found = pictures.detection_pictures(cfg, detector, self._records)
        return list(zip(self._truth, found, strict=True))
