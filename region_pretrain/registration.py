"""User code that registers data sets, executed once in every process.

A config may register data sets when it is loaded. Child processes, SLURM jobs and a saved
``config.yaml`` do not load it, so its path is kept in ``train.register``.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from omegaconf import DictConfig, OmegaConf

from region_pretrain.errors import UserError

#: Data sets of this library. They are registered on import, possibly that by a config.
library_names: set[str] = set()

_executed: set[str] = set()  # absolute paths and names of modules
_registered_by: dict[str, str] = {}  # data set -> what registered it


class _Changeable(Metadata):
    """Metadata that a file may set to other values, e.g. the path of a json that has been fixed."""

    def __setattr__(self, key: str, value: object) -> None:
        self.__dict__[key] = value


@contextmanager
def recording(path: str) -> Iterator[None]:
    """Record that a file is executed, and which data sets it registers.

    A file that is executed again, or two that register the same data set, do not clash: the last
    one counts.

    Args:
        path: the file, or the name of a module.
    """
    path = absolute(path)
    hidden = {n: DatasetCatalog.pop(n) for n in _registered_by if n in DatasetCatalog}
    metadata = [MetadataCatalog.get(name) for name in hidden]
    before = set(DatasetCatalog)
    try:
        for found in metadata:  # the same objects: others may refer to them
            object.__setattr__(found, "__class__", _Changeable)
        yield
    finally:
        for name in set(DatasetCatalog) - before - library_names:
            _registered_by[name] = path
        for name, load in hidden.items():
            DatasetCatalog.setdefault(name, load)
        for found in metadata:
            object.__setattr__(found, "__class__", Metadata)
    _executed.add(path)


@contextmanager
def catalogues_kept() -> Iterator[None]:
    """Restore all data sets after the context; those of executed files that are new stay."""
    loaders = dict(DatasetCatalog)
    metadata = {name: dict(vars(found)) for name, found in MetadataCatalog.items()}
    try:
        yield
    finally:
        for catalogue, before in ((DatasetCatalog, loaders), (MetadataCatalog, metadata)):
            for name in set(catalogue) - set(before) - permanent_names():
                del catalogue[name]
        DatasetCatalog.update(loaders)
        for name, values in metadata.items():
            found = vars(MetadataCatalog.get(name))
            found.clear()
            found.update(values)


def permanent_names() -> set[str]:
    """Data sets of this library and of executed files, which are not registered a second time."""
    return library_names | set(_registered_by)


def absolute(entry: str) -> str:
    """An entry of ``train.register`` with an absolute path; a module's name does not change."""
    if not entry.endswith(".py") or "://" in entry:
        return entry
    return os.path.abspath(os.path.expanduser(entry))


def complete_register(cfg: DictConfig, path: str) -> None:
    """Complete ``train.register`` with whatever registered data sets, and execute its entries.

    Args:
        cfg: changed in place; complete.
        path: the file that the config was loaded from.

    Raises:
        UserError: see :func:`execute`.
    """
    entries = [absolute(entry) for entry in cfg.train.register]
    if (own := absolute(path)) in _registered_by.values():
        entries.append(own)
    if _registered_by:
        texts = set(_texts(OmegaConf.to_container(cfg, resolve=False)))
        entries += [by for name, by in _registered_by.items() if name in texts]
    cfg.train.register = list(dict.fromkeys(entries))
    execute(cfg.train.register)


def _texts(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _texts(child)


def execute(entries: Iterable[str]) -> None:
    """Execute files and import modules, unless this process has done so already.

    Args:
        entries: ``train.register``.

    Raises:
        UserError: an entry cannot be executed or imported.
    """
    for entry in map(absolute, entries):
        if entry in _executed:
            continue
        if not entry.endswith(".py") and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", entry):
            raise UserError(
                f"train.register: {entry!r} is neither a .py file nor the name of a module"
            )
        try:
            with recording(entry):
                if entry.endswith(".py"):
                    LazyConfig.load(entry)
                else:
                    importlib.import_module(entry)
        except Exception as error:  # the user's code may raise anything
            raise UserError(
                f"train.register: {entry} failed: {type(error).__name__}: {error}{path_hint(error)}"
            ) from error


def path_hint(error: Exception) -> str:
    """What a message about the user's code adds if a module was not found."""
    return "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
