"""Configs: find, load, complete, override, save and compare them."""

from __future__ import annotations

import difflib
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import LazyConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from region_pretrain.errors import UserError
from region_pretrain.lazy import refer_to_file, unsaveable
from region_pretrain.yacs import (
    find_config_file,
    is_yacs,
    read_yacs,
    split_overrides,
    to_lazy_config,
)

_PACKAGE = Path(__file__).resolve().parent

#: The ``configs/`` folder of the checkout, or its copy in an installed wheel.
CONFIG_ROOT = next(
    (p for p in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if (p / "detection").is_dir()),
    _PACKAGE.parent / "configs",
)

#: Keys of numbers that are null by default, so that their type cannot be read from the value.
_NUMBERS = ("train.epochs", "train.max_iter", "train.base_batch_size", "train.seed")


def get_config(name: str) -> DictConfig:
    """Load a shipped config, as ``detectron2.model_zoo.get_config`` does for Detectron2's own.

    Args:
        name: path relative to ``configs/``, e.g. ``"detection/mask_rcnn_r50_fpn_4conv1fc.py"``.

    Returns:
        A new config that the caller may change.

    Raises:
        UserError: there is no such config; the message lists the configs of that folder.
    """
    path = CONFIG_ROOT / name
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"no config {name!r} in {CONFIG_ROOT}; its folder contains {near}")
    return LazyConfig.load(str(path))


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a config file, complete it and apply command-line overrides.

    Args:
        path: see :func:`load_file`.
        overrides: see :func:`apply_overrides`; those of a yacs config (``MODEL.MASK_ON=False``)
            are applied before it is converted, all others after.

    Returns:
        The config. ``train`` has every key of ``configs/common/train.py``, so that each can be
        overridden.

    Raises:
        UserError: there is no such file, it cannot be loaded, or an override is invalid.
    """
    of_yacs, overrides = split_overrides(overrides)
    return apply_overrides(complete_train(load_file(path, of_yacs)), overrides)


def load_file(path: str, yacs_overrides: Sequence[str] = ()) -> DictConfig:
    """Load a config file without completing it.

    Args:
        path: a LazyConfig (``.py``), the ``config.yaml`` of a run, or a yacs config (``.yaml``),
            which is converted; a path, or a name in Detectron2's model zoo.
        yacs_overrides: overrides of a yacs config.

    Raises:
        UserError: there is no such file, it cannot be loaded or converted, or an override is
            invalid.
    """
    if not path:
        raise UserError("no config given: use --config-file PATH")
    path = find_config_file(path)
    if is_yacs(path):
        return to_lazy_config(read_yacs(path, yacs_overrides))
    if yacs_overrides:
        raise UserError(
            f"override {yacs_overrides[0]!r}: {path} is not a yacs config, and the keys of a "
            "LazyConfig are in lower case"
        )
    try:
        cfg = LazyConfig.load(path)
        return refer_to_file(cfg, path) if path.endswith(".py") else cfg
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error


def complete_train(cfg: DictConfig) -> DictConfig:
    """Add the defaults of ``configs/common/train.py`` to ``cfg.train``.

    :func:`load_config` has done this for every config that comes from a file, and a complete config
    is returned unchanged. Detectron2's own configs have fewer keys; their
    ``checkpointer.max_to_keep`` becomes ``keep_last``.

    Args:
        cfg: changed in place.

    Returns:
        ``cfg``.
    """
    given, defaults = cfg.get("train", OmegaConf.create()), _train_defaults()
    keys = _keys(given)
    if _keys(defaults) <= keys and "checkpointer.max_to_keep" not in keys:
        return cfg
    train = OmegaConf.merge(defaults, given)
    kept = train.checkpointer.pop("max_to_keep", None)
    if kept is not None and "keep_last" not in given.checkpointer:
        train.checkpointer.keep_last = kept
    cfg.train = train
    return cfg


@functools.cache
def _train_defaults() -> DictConfig:
    return get_config("common/train.py").train


def _keys(cfg: DictConfig) -> set[str]:
    return set(dotted_keys(OmegaConf.to_container(cfg, resolve=False)))


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """``LazyConfig.apply_overrides``, except that a mistyped key is an error, not a new key.

    Args:
        cfg: changed in place.
        overrides: ``dotted.key=value`` for an existing key, ``+dotted.key=value`` for a new one;
            values follow Hydra's grammar.

    Returns:
        ``cfg``.

    Raises:
        UserError: an unknown key (the message names the nearest known ones), a single value for a
            group of keys, or invalid syntax.
    """
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            reason = str(error).splitlines()[0].split("Exception: ")[-1]
            raise UserError(
                f"override {text!r} is not of the form key=value (quote strings that contain "
                f"special characters): {reason}"
            ) from None
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise UserError(f"override {text!r}: write a list as {key}=[a,b]")
        if override.is_delete():
            raise UserError(f"override {text!r}: keys cannot be removed; set them to null")
        if not override.is_add():
            _check_key(cfg, key, value)
        try:
            LazyConfig.apply_overrides(cfg, [text.removeprefix("+")])
        except (KeyError, OmegaConfBaseException) as error:
            raise UserError(f"override {text!r}: {str(error).splitlines()[0]}") from None
    return cfg


def _check_key(cfg: DictConfig, key: str, value: Any) -> None:
    node: Any = cfg
    for part in key.split("."):
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, DictConfig) and part in list(node.keys()):
            node = node._get_node(part) if OmegaConf.is_missing(node, part) else node[part]
        else:
            raise UserError(f"no key {key!r} in the config{_hint(cfg, key)}; to add it: +{key}=...")
    number = isinstance(node, int | float) and not isinstance(node, bool) or key in _NUMBERS
    if number and isinstance(value, str) and not value.startswith("${"):
        raise UserError(f"{key}={value}: must be a number")
    # A value that the config computes lazily, such as a data set's name, may be replaced by text.
    computed = isinstance(node, DictConfig) and "_target_" in node and "." in key
    scalar = isinstance(value, int | float) or isinstance(value, str) and not computed
    if isinstance(node, DictConfig) and scalar:
        keys = ", ".join(f"{key}.{k}" for k in list(node.keys())[:6])
        raise UserError(f"{key} is a group, not a value; its keys: {keys}")


def _hint(cfg: DictConfig, key: str) -> str:
    known = list(dotted_keys(OmegaConf.to_container(cfg, resolve=False)))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    last = key.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == last and k not in near][:3]
    return f"; did you mean {', '.join(near)}?" if near else ""


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of nested dicts and lists in dotted form, including the keys of groups."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        return
    for key, child in items:
        yield f"{prefix}{key}"
        yield from dotted_keys(child, f"{prefix}{key}.")


def to_yaml(cfg: DictConfig) -> str:
    """A config as ``LazyConfig.save`` writes it.

    Raises:
        UserError: the config contains an object that YAML cannot represent, such as a lambda.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        LazyConfig.save(cfg, path)
        if os.path.exists(f"{path}.pkl") or not os.path.exists(path):
            raise UserError(
                f"{', '.join(unsaveable(cfg)) or 'the config'} cannot be saved as YAML: "
                "use importable functions and classes instead of lambdas"
            )
        with open(path, encoding="utf-8") as f:
            return f.read()


def changed_keys(old: DictConfig, new: DictConfig) -> dict[str, tuple[str, str]]:
    """Compare two configs in their saved form, in which a class is its importable name.

    Returns:
        Dotted key of each leaf that differs -> (old, new) as text. A leaf that one of them lacks is
        ``(absent)`` there.
    """
    return _differences(yaml.unsafe_load(to_yaml(old)), yaml.unsafe_load(to_yaml(new)))


def _differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {k: (old.get(k, _ABSENT), new.get(k, _ABSENT)) for k in [*old, *new]}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = dict(enumerate(zip(old, new, strict=True)))
    else:
        return {} if repr(old) == repr(new) else {prefix: (repr(old), repr(new))}
    changed = {}
    for key, (a, b) in pairs.items():
        changed |= _differences(a, b, f"{prefix}.{key}" if prefix else str(key))
    return changed


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()
