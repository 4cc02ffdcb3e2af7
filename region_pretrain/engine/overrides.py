"""Configs from the command line: a file, and ``key=value`` with keys that exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from region_pretrain.engine.setup import complete_train
from region_pretrain.errors import UserError

#: Keys that hold a number and are null by default.
_NUMBERS = ("train.epochs", "train.max_iter", "train.base_batch_size", "train.seed")


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig file, complete its ``train`` and apply command-line overrides.

    Args:
        path: a ``.py`` config, or the ``config.yaml`` of a run.
        overrides: see :func:`apply_overrides`.

    Returns:
        The config; every key of ``configs/common/train.py`` is there and can be overridden.

    Raises:
        UserError: there is no such file, or an override does not fit.
    """
    return apply_overrides(complete_train(load_file(path)), overrides)


def load_file(path: str) -> DictConfig:
    """Load a lazy-config file as it is.

    Raises:
        UserError: there is no such file, or it is none that can be loaded.
    """
    if not path:
        raise UserError("say which config: --config-file PATH")
    if not PathManager.isfile(path):
        raise UserError(f"no config file {path}")
    try:
        return LazyConfig.load(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """``LazyConfig.apply_overrides``, but a mistyped key is an error and not a new key.

    Args:
        cfg: changed in place.
        overrides: ``dotted.key=value`` for a key that exists, ``+dotted.key=value`` for a new one;
            values in Hydra's grammar.

    Returns:
        ``cfg``.

    Raises:
        UserError: an unknown key (with the nearest known ones), a value in place of a whole group,
            or wrong syntax.
    """
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            reason = str(error).splitlines()[0].split("Exception: ")[-1]
            raise UserError(
                f"override {text!r} is not of the form key=value (quote strings with special "
                f"characters): {reason}"
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
    # A value that a config computes lazily, such as a data set's name, may be given outright.
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
    """Every key of nested dicts and lists in dotted form, groups as well."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        return
    for key, child in items:
        yield f"{prefix}{key}"
        yield from dotted_keys(child, f"{prefix}{key}.")
