"""How far a run is: one small file that it keeps up to date, and that anybody may read.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field

from region_pretrain.files import write_text_atomic


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: iterations, or images, that are finished.
        total: of the whole run.
        seconds_left: the run's own estimate; None while there is none.
        updated: Unix time of this note.
    """

    done: int
    total: int
    seconds_left: float | None = None
    updated: float = field(default_factory=time.time)


def write_progress(path: str, progress: Progress) -> None:
    """Replace the file; a reader sees the old one or the whole new one."""
    write_text_atomic(path, json.dumps(asdict(progress)) + "\n")


def read_progress(path: str) -> Progress | None:
    """What the run last wrote; None where there is no such file yet."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return Progress(**json.load(file))
