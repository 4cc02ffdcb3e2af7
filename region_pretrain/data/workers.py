"""What every loader's worker process does first."""

from __future__ import annotations

import os
import signal

import cv2


def init_worker(_: int) -> None:
    """One thread for OpenCV; and a job's signals are for the process that trains.

    SLURM sends them to every process of a job. A worker that ended on TERM would take its training
    with it before that has saved. Workers end when their loader does.
    """
    cv2.setNumThreads(0)
    if "SUBMITIT_EXECUTOR" in os.environ:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
