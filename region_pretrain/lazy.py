"""Saved LazyConfigs: reading their YAML safely, and values that YAML cannot represent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import yaml
from detectron2.config import LazyCall, LazyConfig
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from region_pretrain.errors import UserError
from region_pretrain.registration import catalogues_kept, recording

_NAMED = (type, FunctionType, MethodType, BuiltinFunctionType)
#: Classes whose objects only hold data. ``LazyConfig.save`` writes objects of Detectron2's configs.
_DATA = {
    "functools.partial",
    "detectron2.layers.shape_spec.ShapeSpec",
    "detectron2.structures.boxes.BoxMode",
}
_PYTHON = "tag:yaml.org,2002:python/"


class _Restricted:
    """Reads the tags that ``LazyConfig.save`` writes; calls nothing but the classes of ``_DATA``.

    Names (``!!python/name``) are imported, as those of ``_target_`` are.
    """

    def make_python_instance(self, suffix, node, args=None, kwds=None, newobj=False):
        if suffix not in _DATA:
            self.find_python_module(suffix, node.start_mark)
        return super().make_python_instance(suffix, node, args, kwds, newobj)

    def find_python_module(self, name, mark):
        raise yaml.constructor.ConstructorError(
            None, None, f"it would call or import {name}, which could run code", mark
        )

    def set_python_instance_state(self, instance, state):
        yaml.FullLoader.set_python_instance_state(self, instance, state, unsafe=False)


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    """The value of any tag of Python as text and containers; imports and calls nothing."""
    if isinstance(node, yaml.ScalarNode):
        return suffix.removeprefix("name:") + node.value
    if isinstance(node, yaml.MappingNode):
        return {suffix: loader.construct_mapping(node, deep=True)}
    values = loader.construct_sequence(node, deep=True)
    return tuple(values) if suffix == "tuple" else {suffix: values}


def _loaders(unsafe: type, safe: type) -> tuple[type, type]:
    """Loaders of complete configs, and of the plain ones that import nothing."""
    config, plain = type("ConfigLoader", (_Restricted, unsafe), {}), type("Plain", (safe,), {})
    plain.add_multi_constructor(_PYTHON, _plain)
    return config, plain


_PURE = _loaders(yaml.UnsafeLoader, yaml.SafeLoader)
#: With libyaml's parser, where PyYAML was built with it: several times as fast.
_FAST = _loaders(yaml.CUnsafeLoader, yaml.CSafeLoader) if yaml.__with_libyaml__ else _PURE


def _loaders_for(text: str) -> tuple[type, type]:
    """libyaml refuses escaped surrogates, which stand for the bytes of paths that are not UTF-8."""
    return _PURE if re.search(r"\\u[dD][89a-fA-F]", text) else _FAST


def load_yaml(text: str) -> Any:
    """Read YAML that ``LazyConfig.save`` has written, without calling anything that it names.

    Raises:
        yaml.YAMLError: the text is not YAML, or has an object that could run code.
        Exception: a name cannot be imported.
    """
    return yaml.load(text, _loaders_for(text)[0])


def load_plain_yaml(text: str) -> Any:
    """Read YAML that ``LazyConfig.save`` has written, with names and objects as text.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, _loaders_for(text)[1])


def value_of(file: str, key: str) -> Any:
    """The value of a key in a LazyConfig file, e.g. a function that the file defines.

    Args:
        file: the ``.py`` file.
        key: dotted key.

    Raises:
        UserError: the file no longer exists, or no longer has the key.
    """
    try:
        # It may register data sets, which are registered already, perhaps with fixed labels.
        with catalogues_kept(), recording(file):
            value = OmegaConf.select(LazyConfig.load(file), key)
    except OSError as error:
        raise UserError(f"{file} is needed for the value of {key}: {error}") from error
    if value is None:
        raise UserError(f"{file} has no {key} any more")
    return value


def refer_to_file(cfg: DictConfig, file: str) -> DictConfig:
    """Replace each value that YAML cannot represent by a lazy :func:`value_of`.

    Paths become text, and scalars of NumPy those of Python. The config can then be saved, compared
    and sent to other processes.

    Args:
        cfg: the unmodified content of ``file``; changed in place.
        file: a ``.py`` config.

    Returns:
        ``cfg``.
    """
    file = file if "://" in file else os.path.abspath(file)
    for key, value in list(_leaves(cfg)):
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, np.generic):
            value = value.item()
        elif _survives(key, value):
            continue
        else:
            value = LazyCall(value_of)(file=file, key=key)
        OmegaConf.update(cfg, key, value, merge=False)
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
        again = load_yaml(yaml.dump(value))
    except Exception:  # a constructor may raise anything
        return False
    return again == value if isinstance(value, _NAMED) else True
