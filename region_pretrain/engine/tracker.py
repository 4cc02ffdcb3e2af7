"""Sends a run's metrics, pictures and checkpoints to the process of a tracking service."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import torch
from detectron2.utils.events import get_event_storage

from region_pretrain.engine.writers import RowWriter
from region_pretrain.errors import UserError
from region_pretrain.tracking.service import SERVICES, Checkpoint, End, Rows, RunInfo

logger = logging.getLogger(__name__)

#: Seconds for what remains to be sent when a run is stopped: a scheduler soon kills it.
_STOPPED_SECONDS = 10.0
#: Seconds after those of the service until its process is killed.
_GRACE = 10.0


class TrackerWriter(RowWriter):
    """Writes to a tracking service; see :mod:`region_pretrain.tracking`.

    Args:
        service: a key of :data:`~region_pretrain.tracking.service.SERVICES`.
        info: the run.
        max_iter: number of iterations of the run.
    """

    def __init__(self, service: str, info: RunInfo, max_iter: int) -> None:
        super().__init__()
        self._title = SERVICES[service]
        self._seconds = info.seconds
        self._max_iter = max_iter
        self._process = subprocess.Popen(
            [sys.executable, "-m", "region_pretrain.tracking.process", service],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._reader = threading.Thread(target=self._relay, daemon=True)
        self._send(info)

    def wait_until_ready(self) -> None:
        """Wait until the service's package is imported and its settings are checked.

        Raises:
            UserError: the package does not work, or its settings are unusable.
        """
        level, _, text = self._process.stdout.readline().decode().strip().partition(" ")
        if level != "ready":
            self._process.kill()
            self._process.wait()
            raise UserError(text or f"{self._title}: its process could not be started")
        self._reader.start()

    def _relay(self) -> None:
        for line in self._process.stdout:
            level, _, text = line.decode("utf-8", "replace").strip().partition(" ")
            logger.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)

    def _send(self, message: RunInfo | Rows | Checkpoint | End) -> None:
        if self._process.stdin.closed:
            return
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except OSError:
            self._process.stdin = open(os.devnull, "wb")  # noqa: SIM115
            self._process.stdin.close()
            logger.warning("%s: its process has ended; the training continues", self._title)

    def write_rows(self, rows: dict[int, dict[str, float]]) -> None:
        pictures = tuple(
            (iteration, name, _png(picture))
            for name, picture, iteration in get_event_storage()._vis_data  # as TensorboardXWriter
        )
        if rows or pictures:
            self._send(Rows(time.time(), rows, pictures))

    def write_checkpoint(self, path: str) -> None:
        """Record a checkpoint that has been written."""
        self._send(Checkpoint(os.path.abspath(path)))

    def close(self) -> None:
        finished = get_event_storage().iter >= self._max_iter
        self._send(End(finished))
        try:
            self._process.wait(self._seconds + _GRACE if finished else _STOPPED_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            logger.warning(
                "%s has not received everything in time; metrics.json is complete", self._title
            )
        self._reader.join(1)


def _png(picture: torch.Tensor | np.ndarray) -> bytes:
    """Encode an image of an ``EventStorage``: (C, H, W), uint8 or float in [0, 1], RGB."""
    pixels = np.asarray(picture.cpu() if isinstance(picture, torch.Tensor) else picture)
    if pixels.dtype != np.uint8:
        pixels = (255 * pixels).round().clip(0, 255).astype(np.uint8)
    bgr = np.ascontiguousarray(pixels.transpose(1, 2, 0)[..., ::-1])
    return cv2.imencode(".png", bgr)[1].tobytes()
