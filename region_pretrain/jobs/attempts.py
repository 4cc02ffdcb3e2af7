"""The record of a run's attempts, kept in its folder so that a requeued job can read it.

Nothing here imports PyTorch: it runs in a process beside every training process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TypedDict

from region_pretrain.json_files import read_json, write_json

#: A job fails after this many consecutive attempts without a new checkpoint or part.
MAX_STALLED = 10

#: Name of the record in a run's folder.
ATTEMPTS_FILE = "attempts.json"
#: Folder -> when this process started an attempt there. Unix time may jump in the meantime.
_began: dict[str, float] = {}


class _Started(TypedDict):
    job: str
    restart: int
    host: str
    started: float
    start: str


class Attempt(_Started, total=False):
    """An attempt of a run.

    Attributes:
        job: its job id.
        restart: SLURM's restart count.
        host: where it ran.
        started, ended: Unix times, never in the wrong order; ``ended`` is None if unknown.
        start: the checkpoint that it resumed from, or "".
        stop: the newest checkpoint at its end.
        parts: a folder whose number of parts stands for a checkpoint, for a tool without any.
        outcome: ``finished``, ``stopped`` (on request; will resume), ``killed`` (a process died
            from a signal, or SLURM gave up the step), ``failed`` (with ``error``) or ``unknown``
            (the attempt recorded no outcome before the next one started). Missing while it runs.
        error: the message of a failed attempt.
    """

    ended: float | None
    stop: str
    parts: str
    outcome: str
    error: str


def read_attempts(output_dir: str) -> list[Attempt]:
    """The attempts of a run, oldest first.

    Raises:
        UserError: the record is damaged.
    """
    path = os.path.join(output_dir, ATTEMPTS_FILE)
    try:
        return read_json(path, list[Attempt], "delete it, which forgets earlier attempts")
    except FileNotFoundError:
        return []


def vanished(attempts: Sequence[Attempt]) -> int:
    """How many attempts in a row, at the end, recorded no outcome: they were killed.

    An attempt before them that wrote a checkpoint without an outcome does not count.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.get("outcome", "unknown") != "unknown":
            break
        if count and attempt["start"] != attempt.get("stop"):
            break
        count += 1
    return count


def start_attempt(output_dir: str, job: str, restart: int, host: str, parts: str = "") -> int:
    """Record the start of an attempt.

    Args:
        output_dir: the run's folder.
        job, restart, host, parts: see :class:`Attempt`.

    Returns:
        The number of consecutive attempts of the same job just before this one that wrote no
        checkpoint and no part.
    """
    attempts = read_attempts(output_dir)
    newest = newest_checkpoint(output_dir, parts)
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
    if parts:
        attempts[-1]["parts"] = parts
    _write(output_dir, attempts)
    _began[output_dir] = time.monotonic()
    return stalled


def end_attempt(output_dir: str, outcome: str, error: str = "") -> None:
    """Record how the running attempt ended, unless an outcome has been recorded already.

    Args:
        output_dir: the run's folder.
        outcome: see :class:`Attempt`.
        error: the message of a failed attempt.
    """
    attempts = read_attempts(output_dir)
    if attempts and "outcome" not in attempts[-1]:
        newest = newest_checkpoint(output_dir, attempts[-1].get("parts", ""))
        started = attempts[-1]["started"]
        if output_dir in _began:
            ended = started + time.monotonic() - _began[output_dir]
        else:
            ended = max(started, time.time())
        attempts[-1] |= {"ended": ended, "stop": newest, "outcome": outcome}
        attempts[-1] |= {"error": error} if error else {}
        _write(output_dir, attempts)


def newest_checkpoint(output_dir: str, parts: str = "") -> str:
    """The file name in ``last_checkpoint``, or the number of files in a folder of parts; or ""."""
    if parts and os.path.isdir(parts):
        return f"{sum(name.startswith('part-') for name in os.listdir(parts))} parts"
    try:
        with open(os.path.join(output_dir, "last_checkpoint"), encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _write(output_dir: str, attempts: Sequence[Attempt]) -> None:
    os.makedirs(output_dir, exist_ok=True)
    write_json(os.path.join(output_dir, ATTEMPTS_FILE), attempts)
