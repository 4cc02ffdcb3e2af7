"""Checks that a pickled checkpoint contains arrays and no code."""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch.nn.parameter", "Parameter"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


def _load_storage(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named[1]}" if named else "is damaged"
        raise pickle.UnpicklingError(f"one of its tensors {what}") from error


class _ArraysOnly(pickle.Unpickler):
    """Resolves only the names needed for arrays, tensors and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_pickle(path: str) -> None:
    """Check, without running its code, that a ``.pkl`` checkpoint is safe to load.

    Args:
        path: file that is about to be passed to ``pickle.load``.

    Raises:
        UserError: it is damaged, not a pickle, or contains anything but arrays and plain
            containers.
    """
    try:
        with PathManager.open(path, "rb") as f:
            _ArraysOnly(f, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} is damaged or not a checkpoint: {error or 'it ends too early'} (a .pkl "
            "checkpoint contains only NumPy arrays or tensors in plain dictionaries, no code)"
        ) from error
