"""A sweep's configs: loaded as the tools load them, and built without memory, before any run."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf

from region_pretrain.config import apply_overrides, load_config
from region_pretrain.data.catalog import FOLDER_PREFIX, check_registered
from region_pretrain.errors import UserError
from region_pretrain.jobs.snapshot import in_checkout
from region_pretrain.modeling.meta_arch import check_contract


@functools.cache
def _file(path: str) -> DictConfig:
    return load_config(path)


#: Overrides that have no say in whether a config builds.
_VALUES = (
    "train.seed",
    "train.init_checkpoint",
    "optimizer.lr",
    "dataloader.train.dataset.regions",
)


@functools.cache
def _build_once(path: str, overrides: tuple[str, ...]) -> None:
    cfg = apply_overrides(copy.deepcopy(_file(path)), overrides)
    try:
        _build(cfg)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever a constructor says
        changed = f" with {' '.join(overrides)}" if overrides else ""
        raise UserError(
            f"{path}{changed} does not build: {type(error).__name__}: {error}"
        ) from error


@functools.cache
def checked_config(path: str, overrides: tuple[str, ...], detection: bool) -> DictConfig:
    """Load a config and build its model (on the meta device), optimiser and schedule.

    Args:
        path: of the config, in the checkout.
        overrides: ``key=value``.
        detection: a config for fine-tuning, else for pre-training.

    Returns:
        The config, which is not to be changed: others get the same.

    Raises:
        UserError: naming the config and what is wrong with it.
    """
    path = in_checkout(path)
    cfg = apply_overrides(copy.deepcopy(_file(path)), overrides)
    wrong = None
    if detection and not {"test", "evaluator"} <= set(cfg.dataloader.keys()):
        wrong = "has no dataloader.test and dataloader.evaluator: it is no detection config"
    elif not detection and "evaluator" in cfg.dataloader:
        wrong = "trains a detector on boxes: it is no pre-training config"
    if wrong:
        raise UserError(f"{path} {wrong}")
    _build_once(path, tuple(o for o in overrides if o.split("=")[0] not in _VALUES))
    return cfg


def _build(cfg: DictConfig) -> None:
    with torch.device("meta"):
        model = instantiate(cfg.model)
    if "evaluator" not in cfg.dataloader:
        check_contract(model)
    cfg.optimizer.params.model = model
    instantiate(cfg.optimizer)
    instantiate(cfg.lr_multiplier)
    for split in ("train", "test"):
        loader = cfg.dataloader.get(split)
        dataset = loader.get("dataset") if loader is not None else None
        names = instantiate(dataset.names) if dataset is not None and "names" in dataset else []
        for name in [names] if isinstance(names, str) else names:
            if not name.startswith(FOLDER_PREFIX):
                check_registered(name)


def content(cfg: DictConfig, without: Sequence[str] = ()) -> str:
    """What a config computes, as text: the same for two that differ in the output folder only.

    Args:
        cfg: not changed.
        without: dotted keys that are to make no difference either.

    Raises:
        UserError: it holds a function without a name, which cannot be saved.
    """
    values = OmegaConf.to_container(cfg, resolve=False)
    for key in ("train.output_dir", *without):
        node, (*path, last) = values, key.split(".")
        for part in path:
            node = node[part]
        node[last] = None
    return json.dumps(values, default=_named, sort_keys=True)


def _named(value: Any) -> str:
    if not callable(value):
        return repr(value)
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" in name:
        raise UserError(f"a config holds {name}: use importable functions and classes, no lambdas")
    return name
