"""States that can be read back, and reading a run's checkpoint completely."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from region_pretrain.convert.reading import check_archive
from region_pretrain.errors import UserError, describe
from region_pretrain.files import free_bytes

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


def plain(state: Any) -> Any:
    """A copy of a state with Python's numbers and tensors instead of NumPy's numbers and arrays.

    PyTorch and Detectron2 refuse to load these, e.g. a learning rate that NumPy has computed.
    """
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.copy())
    if type(state) in (dict, OrderedDict):
        return type(state)((plain(key), plain(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(map(plain, state))
    return state


def plain_hooks(states: dict[str, Any]) -> dict[str, Any]:
    """:func:`plain` states of hooks, by name.

    Raises:
        UserError: one could not be read back.
    """
    found = {}
    for name, state in states.items():
        buffer = io.BytesIO()
        try:
            found[name] = plain(state)
            torch.save(found[name], buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:  # pickling runs the code of any class
            raise UserError(
                f"the state_dict of the hook {name} cannot be saved and read back: return numbers, "
                f"strings, tensors, and lists and dicts of these ({describe(error)[:200]})"
            ) from error
    return found


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


def check_free_space(
    folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, has_one: bool = False
) -> None:
    """Refuse to start a run whose checkpoints do not fit on the disk.

    Two must fit, as the older one is deleted only after the newer one is complete. The size of a
    checkpoint is that of the model's tensors plus one buffer per trained parameter (two for
    Adam-like optimisers).

    Args:
        folder: where checkpoints are written.
        model: its complete state is saved.
        optimizer: its buffers are saved.
        has_one: the folder has a checkpoint already.

    Raises:
        UserError: there is not enough space.
    """
    free = free_bytes(folder)
    if free is None:
        return
    buffers = 2 if "betas" in optimizer.defaults else 1
    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    for group in optimizer.param_groups:
        size += buffers * sum(p.numel() * p.element_size() for p in group["params"])
    if free < (1 if has_one else 2) * size:
        count = "another checkpoint" if has_one else "two checkpoints"
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB free, but {count} of {size / 2**20:.0f} "
            "MiB must fit: free some space or set train.output_dir to another disk"
        )
