"""The record of a run's attempts, kept in its folder so that a requeued job can read it.

Nothing here imports PyTorch: it runs in a process beside every training process.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from region_pretrain.files import write_text_atomic

#: A job fails after this many consecutive attempts without a new checkpoint.
MAX_STALLED = 10

_NAME = "attempts.json"


def read_attempts(output_dir: str) -> list[dict[str, Any]]:
    """The attempts of a run, oldest first.

    Returns:
        One dict per attempt with ``job`` (id), ``restart`` (SLURM's restart count), ``host``,
        ``started`` (Unix time) and ``start`` (the checkpoint it resumed from, or ""). An attempt
        that has ended also has ``ended``, ``stop`` (the newest checkpoint) and ``outcome``:
        ``finished``, ``stopped`` (on request; will resume), ``killed`` (a process died from a
        signal, or SLURM gave up the step), ``failed`` (with ``error``) or ``unknown`` (the attempt
        recorded no outcome before the next one started).
    """
    try:
        with open(os.path.join(output_dir, _NAME), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return []


def start_attempt(output_dir: str, job: str, restart: int, host: str) -> int:
    """Record the start of an attempt.

    Returns:
        The number of consecutive attempts of the same job just before this one that wrote no
        checkpoint.
    """
    attempts = read_attempts(output_dir)
    newest = newest_checkpoint(output_dir)
    if attempts and "outcome" not in attempts[-1]:
        attempts[-1] |= {"ended": None, "stop": newest, "outcome": "unknown"}
    stalled = 0
    for attempt in reversed(attempts):
        if attempt["job"] != job or attempt["start"] != attempt["stop"]:
            break
        stalled += 1
    attempts.append(
        {"job": job, "restart": restart, "host": host, "started": time.time(), "start": newest}
    )
    _write(output_dir, attempts)
    return stalled


def end_attempt(output_dir: str, outcome: str, error: str = "") -> None:
    """Record how the running attempt ended, unless an outcome has been recorded already.

    Args:
        output_dir: the run's folder.
        outcome: see :func:`read_attempts`.
        error: the message of a failed attempt.
    """
    attempts = read_attempts(output_dir)
    if attempts and "outcome" not in attempts[-1]:
        newest = newest_checkpoint(output_dir)
        attempts[-1] |= {"ended": time.time(), "stop": newest, "outcome": outcome}
        attempts[-1] |= {"error": error} if error else {}
        _write(output_dir, attempts)


def newest_checkpoint(output_dir: str) -> str:
    """The file name in ``last_checkpoint``; "" without that file."""
    try:
        with open(os.path.join(output_dir, "last_checkpoint"), encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _write(output_dir: str, attempts: list[dict[str, Any]]) -> None:
    os.makedirs(output_dir, exist_ok=True)
    write_text_atomic(os.path.join(output_dir, _NAME), json.dumps(attempts, indent=1) + "\n")
