"""Detectron2's proposal files, unpickled without running code from them."""

from __future__ import annotations

import collections
import pickle
from typing import Any, BinaryIO

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from region_pretrain.regions.elsewhere.table import BoxTable, errors_name, name_of

_RENAMED = {"indexes": "ids", "scores": "objectness_logits"}  # Detectron1's names
_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


class _Latin1:
    """``codecs.encode``, which Python 2's pickles of arrays call for their bytes."""

    __slots__ = ()  # a pickle cannot set attributes

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"text encoded as {encoding} is not accepted")
        return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Accepts NumPy arrays and scalars of numbers, plain containers and a ``BoxMode``."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}: only NumPy arrays and plain containers are accepted"
        )


_CLASSES = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _Latin1(),
    ("detectron2.structures.boxes", "BoxMode"): int,  # called with its value
}


def load_arrays(file: BinaryIO) -> Any:
    """Unpickle arrays and plain containers; nothing else is imported or called.

    Raises:
        pickle.UnpicklingError: the pickle contains something else.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()


def read_proposals(path: str) -> BoxTable:
    """Read a file of ``detectron2.data.build.load_proposals_into_dataset``.

    It is a pickled dict of lists with one element per image: ``ids``, ``boxes`` ``(N, 4)`` and
    ``objectness_logits`` ``(N,)``; and ``bbox_mode``, by default XYXY_ABS. Logits become
    probabilities. Detectron1's names ``indexes`` and ``scores`` are accepted; its scores are kept.

    Raises:
        UserError: the file is damaged or in another format.
    """
    with errors_name(path, "a file of Detectron2's proposals"):
        with open(PathManager.get_local_path(path), "rb") as file:
            data = load_arrays(file)
        if not isinstance(data, dict):
            raise ValueError(f"it contains a {type(data).__name__} instead of a dict")
        logits = "objectness_logits" in data
        data = {_RENAMED.get(key, key): value for key, value in data.items()}
        missing = {"ids", "boxes", "objectness_logits"} - set(data)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        mode = BoxMode(data.get("bbox_mode", BoxMode.XYXY_ABS))
        if mode not in _MODES:
            raise ValueError(f"its bbox_mode is {mode.name}: must be XYXY_ABS or XYWH_ABS")
        ids, found, scored = data["ids"], data["boxes"], data["objectness_logits"]
        if not len(ids) == len(found) == len(scored):
            raise ValueError(f"{len(ids)} ids, {len(found)} boxes and {len(scored)} scores differ")
        names = [name_of(n.item() if isinstance(n, np.generic) else n) for n in ids]
        boxes = [_numbers(some, (-1, 4), names[i]) for i, some in enumerate(found)]
        scores = [_numbers(some, (-1,), names[i]) for i, some in enumerate(scored)]
        counts = np.array([len(some) for some in boxes], np.int64)
        if wrong := [names[i] for i, some in enumerate(scores) if len(some) != counts[i]]:
            raise ValueError(f"image {wrong[0]} has another number of boxes than of scores")
        if len(set(names)) < len(names):
            raise ValueError("an id appears twice")
        values = np.concatenate([np.zeros((0, 4)), *boxes])
        if mode == BoxMode.XYWH_ABS:
            values[:, 2:] += values[:, :2]
        confidence = np.concatenate([np.zeros(0), *scores])
        if logits:
            confidence = 0.5 * (1 + np.tanh(0.5 * confidence))  # the sigmoid, without overflow
        rows = np.repeat(np.arange(len(names)), counts)
        return BoxTable.of(names, True, rows, values, confidence)


def _numbers(values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Float64 values of one image in this shape."""
    array = np.asarray(values)
    if array.size and (array.dtype.kind not in "fiu" or array.ndim != len(shape)):
        raise ValueError(f"image {name} has something else than numbers of shape {shape}")
    return array.astype(np.float64).reshape(shape)
