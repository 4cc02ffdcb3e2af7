"""Set-up of a loader's worker processes."""

from __future__ import annotations

import os
import signal

import cv2


def init_worker(_: int) -> None:
    """Use one OpenCV thread, and leave a job's signals to the training process.

    SLURM sends them to every process of a job. If a worker exited on SIGTERM, the training process
    would fail before it has saved a checkpoint. Workers exit with their loader.
    """
    cv2.setNumThreads(0)
    if "SUBMITIT_EXECUTOR" in os.environ:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
