"""Reads a run's checkpoint completely, or says what is wrong with it."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from region_pretrain.convert.reading import check_archive
from region_pretrain.errors import UserError, describe

#: The entries that every checkpoint of a run has, and their types.
_ENTRIES = {
    "model": dict,
    "pretraining": dict,
    "hooks": dict,
    "rng": list,
    "run": dict,
    "iteration": int,
}


class DamagedCheckpoint(UserError):
    """A file that is not a complete checkpoint of a run."""


def read_run_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint that :class:`~region_pretrain.engine.checkpoint.RunCheckpointer` wrote.

    The checksums of the archive are compared first, as ``torch.load`` ignores them.

    Args:
        path: file or URL.

    Returns:
        Its content, on the CPU.

    Raises:
        DamagedCheckpoint: the file is missing, damaged, or not a checkpoint of a run.
    """
    try:
        local = PathManager.get_local_path(path)
        check_archive(local)
        data = torch.load(local, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing") from error
    except Exception as error:  # damaged bytes raise all kinds of exceptions
        raise DamagedCheckpoint(f"{path} is damaged ({describe(error)[:200]})") from error
    if not isinstance(data, dict):
        raise DamagedCheckpoint(f"{path} is not a checkpoint of a run: no dict")
    wrong = [name for name, kind in _ENTRIES.items() if not isinstance(data.get(name), kind)]
    if wrong:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of a run: no {', '.join(wrong)}")
    return data
