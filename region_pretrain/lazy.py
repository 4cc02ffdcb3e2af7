"""Values of LazyConfigs that YAML cannot represent, such as lambdas."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import yaml
from detectron2.config import LazyCall, LazyConfig
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from region_pretrain.errors import UserError

_NAMED = (type, FunctionType, MethodType, BuiltinFunctionType)


def value_of(file: str, key: str) -> Any:
    """The value of a key in a LazyConfig file, e.g. a function that the file defines.

    Args:
        file: the ``.py`` file.
        key: dotted key.

    Raises:
        UserError: the file no longer exists, or no longer has the key.
    """
    try:
        value = OmegaConf.select(LazyConfig.load(file), key)
    except OSError as error:
        raise UserError(f"{file} is needed for the value of {key}: {error}") from error
    if value is None:
        raise UserError(f"{file} has no {key} any more")
    return value


def refer_to_file(cfg: DictConfig, file: str) -> DictConfig:
    """Replace each value that YAML cannot represent by a lazy :func:`value_of`.

    The config can then be saved, compared and sent to other processes.

    Args:
        cfg: the unmodified content of ``file``; changed in place.
        file: a ``.py`` config.

    Returns:
        ``cfg``.
    """
    file = file if "://" in file else os.path.abspath(file)
    for key in unsaveable(cfg):
        OmegaConf.update(cfg, key, LazyCall(value_of)(file=file, key=key), merge=False)
    return cfg


def unsaveable(cfg: DictConfig) -> list[str]:
    """Dotted keys of the values that YAML cannot represent: lambdas, local classes, modules."""
    return [key for key, value in _leaves(cfg) if not _survives(key, value)]


def _leaves(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node.keys()):
        child = node._get_node(key)
        if not OmegaConf.is_config(child):
            yield f"{prefix}{key}", child._value()
        elif not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from _leaves(child, f"{prefix}{key}.")


def _survives(key: str, value: Any) -> bool:
    if value is None or isinstance(value, str | int | float):
        return True
    if isinstance(value, nn.Module | Tensor):  # megabytes of text
        return False
    try:
        if key.endswith("_target_"):  # saved by name
            return locate(_convert_target_to_string(value)) == value
        again = yaml.unsafe_load(yaml.dump(value))
    except Exception:  # a constructor may raise anything
        return False
    return again == value if isinstance(value, _NAMED) else True
