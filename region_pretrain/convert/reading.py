"""Reads checkpoint files of any origin without running code from them.

Tensors, arrays and plain containers are restored. Objects that only describe a run, such as an
``argparse.Namespace`` or an OmegaConf node, become inert stand-ins. A file that names anything that
could run code is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors
import torch
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file

import region_pretrain.zoo  # noqa: F401  registers zoo://
from region_pretrain.convert.digest import DIGEST, digest_of
from region_pretrain.errors import UserError, describe

_NUMPY = {
    f"numpy.{core}.{module}.{name}"
    for core in ("core", "_core")
    for module, name in (
        ("multiarray", "_reconstruct"),
        ("multiarray", "scalar"),
        ("numeric", "_frombuffer"),
    )
}
_RESTORED = _NUMPY | {
    "collections.OrderedDict",
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
    "torch.Tensor",
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
}
#: Classes of the standard library that hold data. All others could do something.
_HARMLESS = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "collections.defaultdict",
    "collections.deque",
    "collections.Counter",
    "builtins.set",
    "builtins.frozenset",
    "builtins.slice",
    "builtins.range",
    "builtins.complex",
    "builtins.list",
    "builtins.dict",
    "builtins.tuple",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
    "builtins.object",
    "builtins.bytearray",
    "copyreg._reconstructor",
    "typing.Any",
}
_HARMLESS_MODULES = ("pathlib", "datetime", "enum", "decimal", "fractions", "uuid", "typing")


_DOS_FOLDER = 0x10


class _Inert(dict):
    """Stands for an object that is not needed; whatever is done to it has no effect."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def append(self, item: Any) -> None:
        """Called for the items of a list."""

    def extend(self, items: Any) -> None:
        """Called for the items of a list."""

    def add(self, item: Any) -> None:
        """Called for the items of a set."""


class _Unpickler(pickle.Unpickler):
    """Restores arrays, tensors and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        # Up to protocol 2 names are those of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes":
            return _load_storage
        if full in _RESTORED or _is_torch_data(module, name):
            return super().find_class(module, name)
        top = full.partition(".")[0]
        if full in _HARMLESS or top in _HARMLESS_MODULES:
            return _Inert
        if top in sys.stdlib_module_names or top in ("torch", "numpy"):
            raise pickle.UnpicklingError(f"it names {full}, which could run code")
        return _Inert  # an object of some other package


def _is_torch_data(module: str, name: str) -> bool:
    """Whether a name is one of torch's storage classes or dtypes."""
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return True
    storages = module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage")
    return storages and name.isidentifier()


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False, pickle_module=_PICKLE)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


#: What ``torch.load`` needs of the module ``pickle``.
_PICKLE = SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="pickle")


def checkpoint_of(path: str) -> str:
    """The ``model_final.pth`` of a run's folder, whether there is one or not; other paths as is."""
    return os.path.join(path, "model_final.pth") if os.path.isdir(path) else path


def read_checkpoint(path: str) -> Any:
    """Read a checkpoint: PyTorch's formats, safetensors, or a pickle of arrays.

    The format is recognised by the file's content, not by its extension. Checksums are compared:
    those of zip archives (PyTorch since 1.6), and the digest in files that
    :mod:`region_pretrain.convert.export` wrote. Other formats have none.

    Args:
        path: file or URL that ``PathManager`` opens, or the output folder of a run.

    Returns:
        The content, in which arrays have become tensors. Objects that are not needed are replaced
        by empty stand-ins.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint, or it names something that
            could run code.
    """
    if not path:
        raise UserError("no checkpoint to load: the path is empty (train.init_checkpoint)")
    path, given = checkpoint_of(path), path
    try:
        local = PathManager.get_local_path(path)
        with open(local, "rb") as file:
            head = file.read(16)
    except FileNotFoundError as error:
        hint = "" if path == given else ": name one of its checkpoints, or finish the run"
        raise UserError(f"cannot read the checkpoint {path}: no such file{hint}") from error
    except (OSError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read the checkpoint {path}: {reason}") from error
    try:
        return _verified(_tensors(_read(local, head)))
    except UserError:
        raise
    except Exception as error:  # damaged files raise all kinds of exceptions
        reason = describe(error)[:200] if str(error).strip() else "it ends early"
        raise UserError(
            f"cannot read the checkpoint {path}: it is damaged, or not a checkpoint ({reason})"
        ) from error


def _read(path: str, head: bytes) -> Any:
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return {"model": load_file(path), "metadata": metadata}
    if head.startswith(b"PK"):
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    with open(path, "rb") as file:
        first = _load(file, encoding="latin1")
    if not isinstance(first, int):
        return first
    # The magic number of PyTorch's format before 1.6.
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def check_archive(path: str) -> None:
    """Compare the checksums of a file that ``torch.save`` wrote, which ``torch.load`` ignores.

    Raises:
        Exception: of any kind, if the file is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # PyTorch leaves the memory of an entry that is marked as a folder uninitialised.
            folder = entry.is_dir() or entry.external_attr & _DOS_FOLDER
            if folder or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the entry {entry.filename!a} is not a stored file")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")


def _verified(content: Any) -> Any:
    """Compare a content with its digest, if it has one."""
    if not isinstance(content, dict):
        return content
    metadata = content.get("metadata")
    digest = content.get(DIGEST)
    checked = content
    if isinstance(metadata, dict) and DIGEST in metadata:  # safetensors
        digest = metadata[DIGEST]
        rest = {key: value for key, value in metadata.items() if key != DIGEST}
        checked = {**content, "metadata": rest}
    if digest is not None and digest != digest_of(checked):
        raise ValueError("its sha256 is wrong")
    return content


def _tensors(content: Any) -> Any:
    """Nested dicts with tensors in place of arrays."""
    if isinstance(content, np.ndarray) and content.dtype.kind in "fiub":
        return torch.from_numpy(np.array(content))  # a copy: the array may be read-only
    if isinstance(content, torch.nn.Parameter):
        return content.data
    if isinstance(content, dict) and not isinstance(content, _Inert):
        return {key: _tensors(value) for key, value in content.items()}
    return content
