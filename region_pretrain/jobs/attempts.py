"""What became of a job's attempts: kept in the run's folder, so that a requeued job knows.

Nothing here imports PyTorch: these lines run beside every training process.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from region_pretrain.files import write_text_atomic

#: So many attempts in a row may end without a new checkpoint; the next one is not made.
MAX_FRUITLESS = 10

_NAME = "attempts.json"


def read_attempts(output_dir: str) -> list[dict[str, Any]]:
    """The attempts of a run, oldest first.

    Returns:
        Each with ``job`` (id), ``restart`` (count of SLURM), ``host``, ``started`` (Unix time),
        ``start`` (checkpoint that it went on from, "" for none); when it is over ``ended``,
        ``stop`` (newest checkpoint) and ``outcome``: ``finished``, ``stopped`` (told to, and will
        go on), ``killed`` (a process died by a signal, or SLURM gave its step up), ``failed`` (with
        its ``error``), or ``lost`` (nobody could say).
    """
    try:
        with open(os.path.join(output_dir, _NAME), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return []


def start_attempt(output_dir: str, job: str, restart: int, host: str) -> int:
    """Note that an attempt starts.

    Returns:
        How many attempts before it, in a row and of the same job, got nowhere.
    """
    attempts = read_attempts(output_dir)
    now = newest_checkpoint(output_dir)
    if attempts and "outcome" not in attempts[-1]:
        attempts[-1] |= {"ended": None, "stop": now, "outcome": "lost"}
    fruitless = 0
    for attempt in reversed(attempts):
        if attempt["job"] != job or attempt["start"] != attempt["stop"]:
            break
        fruitless += 1
    attempts.append(
        {"job": job, "restart": restart, "host": host, "started": time.time(), "start": now}
    )
    _write(output_dir, attempts)
    return fruitless


def end_attempt(output_dir: str, outcome: str, error: str = "") -> None:
    """Note how the running attempt ended; what was noted before stays.

    Args:
        output_dir: the run's folder.
        outcome: see :func:`read_attempts`.
        error: what a failed one has to say.
    """
    attempts = read_attempts(output_dir)
    if attempts and "outcome" not in attempts[-1]:
        stop = newest_checkpoint(output_dir)
        attempts[-1] |= {"ended": time.time(), "stop": stop, "outcome": outcome}
        attempts[-1] |= {"error": error} if error else {}
        _write(output_dir, attempts)


def newest_checkpoint(output_dir: str) -> str:
    """What ``last_checkpoint`` names; "" where there is none."""
    try:
        with open(os.path.join(output_dir, "last_checkpoint"), encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _write(output_dir: str, attempts: list[dict[str, Any]]) -> None:
    os.makedirs(output_dir, exist_ok=True)
    write_text_atomic(os.path.join(output_dir, _NAME), json.dumps(attempts, indent=1) + "\n")
