"""Checks a sweep's configs before any run: they are loaded as the tools load them, and built."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from region_pretrain.config import check_parts, load_config, override_config, to_yaml
from region_pretrain.data.catalog import check_registered
from region_pretrain.data.few_label import find_split
from region_pretrain.data.sources import register_named
from region_pretrain.engine.build import build_part
from region_pretrain.engine.labelled_data import check_labelled_data
from region_pretrain.engine.trainable import frozen_without_weights
from region_pretrain.engine.transfer import check_fits
from region_pretrain.errors import UserError
from region_pretrain.files import is_local, write_text_atomic
from region_pretrain.modeling.dry_run import dry_run
from region_pretrain.modeling.meta_arch import check_contract
from region_pretrain.regions import RegionStore
from region_pretrain.shipped import find_shipped
from region_pretrain.solver import check_schedule
from region_pretrain.yacs import find_config_file, is_yacs, read_yacs, split_overrides


@functools.cache
def _file(path: str, of_yacs: tuple[str, ...]) -> DictConfig:
    return load_config(path, of_yacs)


def load(path: str, overrides: Sequence[str]) -> DictConfig:
    """Like :func:`region_pretrain.config.load_config`, but it reads a file only once."""
    of_yacs, rest = split_overrides(overrides)
    return override_config(copy.deepcopy(_file(path, tuple(of_yacs))), rest, path)


def for_jobs(path: str) -> str:
    """A config's name for a job, which reads the snapshot's copy of a shipped config.

    Args:
        path: see :func:`~region_pretrain.yacs.find_config_file`.

    Returns:
        ``path`` if it names a shipped config or one of the model zoo, else the absolute path.

    Raises:
        UserError: there is no such file.
    """
    found, shipped = find_config_file(path), find_shipped(path)
    own = found == path and not (shipped and os.path.samefile(found, shipped))
    return os.path.abspath(path) if own and is_local(path) else path


def freeze(paths: Iterable[str], folder: str) -> dict[str, str]:
    """Write copies of configs that jobs may read days later, when the user has edited the files.

    Shipped configs need none: the snapshot of the code has them. Python files that a config names
    in ``train.register`` are not copied.

    Args:
        paths: results of :func:`for_jobs`.
        folder: where to write; a copy's name contains a digest of its content.

    Returns:
        Path -> its copy, for each file of the user's own.
    """
    found = {}
    for path in sorted({path for path in paths if os.path.isabs(path)}):
        text = read_yacs(path).dump() if is_yacs(path) else to_yaml(load_config(path))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{os.path.splitext(os.path.basename(path))[0]}-{digest}.yaml"
        found[path] = os.path.join(folder, name)
        os.makedirs(folder, exist_ok=True)
        write_text_atomic(found[path], text)
    return found


#: Overrides that do not affect whether a config builds.
_VALUES = (
    "train.seed",
    "train.init_checkpoint",
    "optimizer.lr",
    "dataloader.train.dataset.regions",
)


#: Models and optimisers that could be built, as text -> the model.
_BUILT: dict[str, nn.Module] = {}


def _built(path: str, overrides: Sequence[str]) -> nn.Module:
    """The model of a config, on the meta device. Optimiser and schedule can be built, too."""
    return _build_once(path, tuple(o for o in overrides if o.split("=")[0] not in _VALUES))


@functools.cache
def _build_once(path: str, overrides: tuple[str, ...]) -> nn.Module:
    cfg = load(path, overrides)
    try:
        return _build(cfg)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a constructor may raise anything
        changed = f" with {' '.join(overrides)}" if overrides else ""
        raise UserError(
            f"{path}{changed} does not build: {type(error).__name__}: {error}"
        ) from error


@functools.cache
def checked_config(path: str, overrides: tuple[str, ...], detection: bool) -> DictConfig:
    """Load a config and build its model (on the meta device), optimiser and schedule.

    Args:
        path: see :func:`~region_pretrain.yacs.find_config_file`.
        overrides: ``key=value``.
        detection: whether it must be a detection config; otherwise a pre-training config.

    Returns:
        The config. It is cached: do not modify it.

    Raises:
        UserError: the config is of the wrong kind or does not build.
    """
    path = find_config_file(path)
    cfg = load(path, overrides)
    check_parts(cfg, path)
    wrong = None
    if detection and not {"test", "evaluator"} <= set(cfg.dataloader.keys()):
        wrong = "is not a detection config: it has no dataloader.test and dataloader.evaluator"
    elif not detection and "evaluator" in cfg.dataloader:
        wrong = "is not a pre-training config: it trains a detector on boxes"
    if wrong:
        raise UserError(f"{path} {wrong}")
    if not detection:
        _check_store(cfg)
    _built(path, overrides)
    return cfg


@functools.cache
def check_split(where: str, split: str, fraction: float, seed: int) -> None:
    """Check before any run that a split file has the images of a fraction and seed.

    Raises:
        UserError: it has not; the message begins with ``where``.
    """
    try:
        find_split(split, fraction, seed)
    except UserError as error:
        raise UserError(f"{where}.label_split={split}: {error}") from None


def _check_store(cfg: DictConfig) -> None:
    """Compare the recipe of an existing region store with the config's."""
    dataset = cfg.dataloader.train.get("dataset", {})
    regions, recipe = dataset.get("regions"), dataset.get("recipe")
    if not isinstance(regions, str) or recipe is None or not os.path.isfile(regions):
        return
    found = RegionStore.open(regions).manifest["recipe"]
    if found != recipe:
        raise UserError(
            f"{regions} was made with recipe {found!r}, but the config requires {recipe!r}: set "
            f"dataloader.train.dataset.recipe={found}, or name another store"
        )


def _build(cfg: DictConfig) -> nn.Module:
    detection = "evaluator" in cfg.dataloader
    if detection:
        check_labelled_data(cfg, training=True, fix=False)
    else:
        register_named(cfg)
        names = instantiate(cfg.dataloader.train.get("dataset", {}).get("names", []))
        for name in [names] if isinstance(names, str) else names:
            check_registered(name)
    check_schedule(instantiate(cfg.lr_multiplier))
    parts = [OmegaConf.to_container(part, resolve=True) for part in (cfg.model, cfg.optimizer)]
    if (text := repr(parts)) in _BUILT:  # e.g. of another length
        return _BUILT[text]
    model = dry_run(lambda: build_part(cfg.model, "model"), "the config's model")
    if not detection:
        check_contract(model)
    cfg.optimizer.params.model = model
    instantiate(cfg.optimizer)
    _BUILT[text] = model
    return model


@functools.cache
def check_transfer(
    config: str, overrides: tuple[str, ...], pretraining: tuple[str, tuple[str, ...]] | None
) -> None:
    """Check before any run that a detector starts from weights, or without frozen layers.

    Args:
        config, overrides: of the fine-tuning.
        pretraining: config and overrides of the pre-training; None: random weights.

    Raises:
        UserError: the pre-trained weights will not load, or random layers are frozen.
    """
    cfg = checked_config(config, overrides, True)
    model = _built(find_config_file(config), overrides)
    if pretraining is None:
        if message := frozen_without_weights(cfg, model):
            raise UserError(message)
        return
    path, of_pretraining = pretraining
    checked_config(path, of_pretraining, False)
    try:
        source = _built(find_config_file(path), of_pretraining)
        check_fits(source, model, cfg.train.init_partial)
    except UserError as error:
        raise UserError(
            f"the weights of {path} would not load into the detector of {config}: {error}"
        ) from None


#: Keys of ``train`` that only affect how a run is kept or resumed, with their defaults. Others of
#: :data:`region_pretrain.engine.output_dir.HARMLESS` remain part of a run's identity: they affect
#: the last digits (``device``, ``compile``) or the curves (``eval_period``, ``log_period``), or
#: shipped sweeps set them, whose finished runs would be computed again (``checkpointer.period``).
_HARMLESS = {
    "allow_world_size_change": False,
    "allow_new_length": False,
    "allow_changed_data": False,
    "checkpoint_minutes": 0,
}


def content(cfg: DictConfig, without: Sequence[str] = ()) -> str:
    """A config as text, equal for configs that compute the same.

    Args:
        cfg: the config; not modified.
        without: dotted keys to ignore, besides ``train.output_dir`` and ``train.register``. What
            only affects metrics' destinations and pictures, when checkpoints are written, or
            whether a run may resume after a change, is ignored as well.

    Raises:
        UserError: the config contains a lambda or a local function, which cannot be saved.
    """
    values = OmegaConf.to_container(cfg, resolve=False)
    for key in ("train.output_dir", "train.register", *without):
        node, (*path, last) = values, key.split(".")
        for part in path:
            node = node[part]
        node[last] = None
    values["train"] |= _HARMLESS
    for key in ("writers", "tracking", "pictures", "diverged_is_result"):
        values["train"].pop(key, None)
    return json.dumps(values, default=_named, sort_keys=True)


def _named(value: Any) -> str:
    if not callable(value):
        return repr(value)
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" in name:
        raise UserError(f"a config contains {name}: use importable functions and classes")
    return name
