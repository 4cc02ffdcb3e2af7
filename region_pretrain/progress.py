"""How far a run is: a small file that the run keeps up to date for anybody to read.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from region_pretrain.files import write_text_atomic

#: Name of the file in a run's output folder.
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: finished iterations or images.
        total: iterations or images of the complete run.
        seconds_left: the run's own estimate; None until it has one.
        updated: modification time of the file that this was read from, by the file system's clock.
    """

    done: int
    total: int
    seconds_left: float | None = None
    updated: float | None = None


def write_progress(path: str, progress: Progress) -> None:
    """Replace the file atomically: a reader sees either the old or the new content.

    It does not wait for the disk, as a training step would.
    """
    names = ("done", "total", "seconds_left")
    text = json.dumps({name: getattr(progress, name) for name in names}) + "\n"
    write_text_atomic(path, text, durable=False)


def read_progress(path: str) -> Progress | None:
    """Read what the run wrote last; None if there is no such file yet, or it is damaged."""
    try:
        with open(path, "rb") as file:
            found = Progress(**json.load(file), updated=os.fstat(file.fileno()).st_mtime)
    except (OSError, TypeError, ValueError, RecursionError):
        return None
    numbers = (found.done, found.total, found.seconds_left or 0)
    return found if all(isinstance(n, int | float) for n in numbers) else None
