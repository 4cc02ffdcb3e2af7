"""Pre-training configs made from the name of a method and a detector's config."""

from __future__ import annotations

import argparse
import ast
import copy
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from region_pretrain.config import complete_train, get_config, load_file, override_config
from region_pretrain.engine.build import build_part
from region_pretrain.engine.trainable import check_trainable
from region_pretrain.errors import UserError, describe
from region_pretrain.modeling.detector import Detector, model_of, refuse_input_format
from region_pretrain.modeling.dry_run import dry_run
from region_pretrain.modeling.given import as_lazy_detector
from region_pretrain.modeling.meta_arch import PretrainingModel, check_contract, check_names
from region_pretrain.modeling.norm_keys import norm_errors
from region_pretrain.overrides import apply_overrides, target_of
from region_pretrain.registration import absolute, execute, path_hint, recording
from region_pretrain.shipped import ROOT
from region_pretrain.yacs import (
    find_config_file,
    is_yacs,
    lazy_detector,
    override_yacs,
    read_yacs,
    refuse_weights,
    split_overrides,
)
from region_pretrain.yacs.build import as_cfg_node, build_detector

logger = logging.getLogger(__name__)

_PARTS = ("dataloader", "optimizer", "lr_multiplier", "train")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--method`` and ``--detector``."""
    group = parser.add_argument_group("instead of --config-file")
    group.add_argument(
        "--method",
        metavar="NAME",
        help=f"a folder of projects/: {', '.join(sorted(_folders()))}; or the file of a recipe of "
        "your own (.py)",
    )
    group.add_argument(
        "--detector",
        metavar="FILE",
        help="config of the detector to pre-train: a Detectron2 .yaml or .py, the config.yaml of a "
        "run, or a name in Detectron2's model zoo; KEY.IN.UPPER_CASE=value changes a .yaml",
    )


def load_method(
    method: str, detector: str | DictConfig | CfgNode | nn.Module, overrides: Sequence[str] = ()
) -> DictConfig:
    """A method's default recipe for a detector, with AdamW if its trunk has layer norms.

    A file in the project's ``configs/common`` defines ``dataloader``, ``optimizer``,
    ``lr_multiplier`` and ``train``, and a function ``pretrain(detector)`` that returns ``model``.
    It may adapt the other four, and raises a ``UserError`` for detectors that do not fit.

    Args:
        method: the name of a folder in ``projects/`` or of that file; upper and lower case, ``-``
            and ``_`` do not matter. Or the path of such a file (``.py``) of the user's own.
        detector: a detection config, as a file (see :func:`region_pretrain.config.load_file`) or
            loaded, or a built detector, whose own modules the model then contains.
        overrides: those of a yacs detector apply to it, all others to the pre-training config.

    Returns:
        A complete config. Its model has been built once, without weights, unless it consists of
        the modules of a built detector.

    Raises:
        UserError: there is no such method or detector, or they do not fit.
    """
    of_yacs, overrides = split_overrides(overrides)
    refuse_weights(of_yacs)
    path, (pretrain, *parts) = _recipe(method, ("pretrain", *_PARTS))
    # What they register may be the detector's modules.
    execute(_register_of(overrides))
    around, entries = load_detector(detector, of_yacs)
    is_built = isinstance(detector, nn.Module)
    model = pretrain(around)
    cfg = DictConfig(
        {"model": model, **dict(zip(_PARTS, parts, strict=True))}, flags={"allow_objects": True}
    )
    if Detector(around).has_layer_norms:
        _use_adamw(cfg)
    override_config(complete_train(cfg), overrides, str(path))
    cfg.train.register = list(dict.fromkeys([*map(absolute, entries), *cfg.train.register]))
    if is_built:
        return cfg
    built = dry_run(lambda: check_contract(build_part(cfg.model, "model")), "the config's model")
    _check_names(built, around)
    if not cfg.train.init_checkpoint:  # else once its weights are loaded
        check_trainable(cfg, built)
    return cfg


def _check_names(model: PretrainingModel, detector: DictConfig) -> None:
    """:func:`~region_pretrain.modeling.meta_arch.check_names` with those of a lazy detector.

    Most detectors call their modules as their arguments. Only if the names differ, it is built.
    """
    values = OmegaConf.to_container(detector, resolve=False)
    parts = {key: value for key, value in values.items() if isinstance(value, dict)}
    heads = parts.get("roi_heads", {})
    stages = {"box_heads": "box_head", "box_predictors": "box_predictor"}  # of a Cascade R-CNN
    names = {*parts, *(f"roi_heads.{stages.get(key, key)}" for key in heads)}
    try:
        check_names(model, names)
    except UserError:
        if "_target_" not in detector:
            raise
        if built := _built_names(detector):
            check_names(model, built)


def _built_names(detector: DictConfig) -> set[str]:
    """The names of a detector's modules; none if it cannot be built yet, e.g. without classes."""
    node = copy.deepcopy(detector)
    try:
        refuse_input_format(node)
    except UserError:
        del node.input_format  # of its mapper
    try:
        built = dry_run(lambda: instantiate(node), "the detector")
    except Exception:  # the user's code may raise anything
        return set()
    return {name for name, _ in built.named_modules(remove_duplicate=False)}


def _register_of(overrides: Sequence[str]) -> list[str]:
    """``train.register`` among the overrides; anything but a list is refused later."""
    given = [text for text in overrides if text.startswith("train.register=")]
    cfg = DictConfig({"train": {"register": []}})
    apply_overrides(cfg, given)
    value = cfg.train.register
    return list(value) if isinstance(value, ListConfig) else []


def default_recipe(method: str) -> str | None:
    """The id of the region recipe of a method; None if it needs no regions.

    Args:
        method: see :func:`load_method`.

    Raises:
        UserError: there is no such method.
    """
    return _recipe(method, ("dataloader",))[1][0].train.dataset.recipe


def _use_adamw(cfg: DictConfig) -> None:
    adamw = get_config("common/adamw_pretrain.py")
    cfg.optimizer, cfg.lr_multiplier = adamw.optimizer, adamw.lr_multiplier
    cfg.train.merge_with(adamw.train)
    logger.warning(  # before the run logs: information would be lost
        "the detector's trunk has layer norms: optimiser and schedule are those of "
        "configs/common/adamw_pretrain.py, not the method's"
    )


def load_detector(
    detector: str | DictConfig | CfgNode | nn.Module, yacs_overrides: Sequence[str] = ()
) -> tuple[DictConfig, list[str]]:
    """``model`` of a detection config, with lazy modules even if the config is one of yacs.

    Args:
        detector: see :func:`load_method`.
        yacs_overrides: overrides of a yacs config.

    Returns:
        The model, and the ``train.register`` of the config, which has been executed.

    Raises:
        UserError: the config cannot be loaded or converted, or is not that of a detector.
    """
    name = f"--detector {detector}" if isinstance(detector, str) else "the detector"
    try:
        if isinstance(detector, nn.Module | CfgNode):
            if yacs_overrides and isinstance(detector, nn.Module):
                raise UserError(f"override {yacs_overrides[0]!r}: it is built already")
            if isinstance(detector, nn.Module):
                return as_lazy_detector(detector), []
            return _lazy(override_yacs(detector.clone(), yacs_overrides)), []
        if isinstance(detector, str) and is_yacs(path := find_config_file(detector)):
            # Its data sets and solver are those of the fine-tuning.
            return _lazy(read_yacs(path, yacs_overrides)), []
        cfg = load_file(detector, yacs_overrides) if isinstance(detector, str) else detector
        entries = list(OmegaConf.select(cfg, "train.register") or [])
        execute(entries)
        if "backbone" in cfg:
            refuse_input_format(cfg)
        model = cfg if "backbone" in cfg else model_of(cfg)
        target = target_of(model)
        if target is build_detector:
            return _lazy(as_cfg_node(model.cfg)), entries
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if not {"backbone", "pixel_mean", "pixel_std"} <= set(model):
        raise UserError(
            f"{name}: not the config of a detector, whose model has backbone, pixel_mean and "
            "pixel_std"
        )
    if isinstance(target, type) and issubclass(target, PretrainingModel):
        raise UserError(f"{name}: a pre-training config; give the detector's own")
    return model, entries


def _lazy(cfg: CfgNode) -> DictConfig:
    with norm_errors(cfg):
        return dry_run(lambda: lazy_detector(cfg), f"MODEL.BACKBONE.NAME={cfg.MODEL.BACKBONE.NAME}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _folders() -> dict[str, Path]:
    """Name of each project -> its ``configs`` folder, in a checkout or in an installed wheel."""
    return {path.parent.name: path for path in (ROOT / "projects").glob("*/configs")}


def _recipe(method: str, names: Sequence[str]) -> tuple[Path, Sequence[Any]]:
    """The file of a method's recipe, and what it calls these names."""
    path = _find(method)
    try:
        with recording(str(path)):
            return path, LazyConfig.load(str(path), names)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"method {method} cannot be loaded: {describe(error)}{path_hint(error)}"
        ) from error


def _find(method: str) -> Path:
    """The file with a method's ``pretrain``."""
    if method.endswith(".py"):
        path = Path(method).expanduser()
        if not path.is_file():
            raise UserError(f"method {method}: no such file")
        if "pretrain" not in _names(path):
            raise UserError(
                f"method {method}: the file has no function pretrain(detector); a config that "
                "names its detector is given as --config-file"
            )
        return path
    for name, configs in _folders().items():
        for path in sorted((configs / "common").glob("*.py")):
            wanted = _plain(method) in (_plain(name), _plain(path.stem))
            if wanted and "pretrain" in _names(path):
                return path
    raise UserError(
        f"method {method}: must be one of {', '.join(sorted(_folders()))}, or the path of a recipe "
        "(.py)"
    )


def is_recipe(path: str) -> bool:
    """Whether a file is a recipe for any detector, rather than a config that has one."""
    file = Path(path).expanduser()
    if not (path.endswith(".py") and file.is_file()):
        return False
    found = _names(file)
    return "pretrain" in found and "model" not in found


def _names(path: Path) -> set[str]:
    """The functions and variables of a Python file, as far as its text tells."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded: {describe(error)}") from None
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}
