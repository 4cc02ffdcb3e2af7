"""Configs: find, load, complete, save and compare them."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from omegaconf import DictConfig, OmegaConf

from region_pretrain.dataset_names import make_names_absolute
from region_pretrain.errors import UserError, describe
from region_pretrain.lazy import load_plain_yaml, load_yaml, refer_to_file, unsaveable
from region_pretrain.overrides import apply_overrides, check_values, dotted_keys
from region_pretrain.registration import complete_register, path_hint, recording
from region_pretrain.shipped import ROOT
from region_pretrain.yacs import (
    counterpart,
    find_config_file,
    is_yacs,
    read_yacs,
    refuse_converted_keys,
    split_overrides,
    to_lazy_config,
)

logger = logging.getLogger(__name__)

#: The ``configs/`` folder of the checkout, or its copy in an installed wheel.
CONFIG_ROOT = ROOT / "configs"

#: Keys of a detector's number of classes. With null it follows from the data.
NUM_CLASSES = (
    "model.roi_heads.num_classes",
    "model.num_classes",
    "model.head.num_classes",
    "model.cfg.MODEL.ROI_HEADS.NUM_CLASSES",
    "model.cfg.MODEL.RETINANET.NUM_CLASSES",
)

#: What a training reads of a config, besides ``train``, which has defaults.
TRAINED = ("model", "dataloader.train", "optimizer", "lr_multiplier")

_MAX_ITER = ("train.max_iter", "model.cfg.SOLVER.MAX_ITER")


class _Utf8(PathHandler):
    """Opens local files as UTF-8: Detectron2 writes text in the encoding of the locale."""

    PREFIX = "utf8://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        encoding = None if "b" in mode else "utf-8"
        return open(path.removeprefix(self.PREFIX), mode, buffering, encoding)


PathManager.register_handler(_Utf8(), allow_override=True)


def get_config(name: str) -> DictConfig:
    """Load a shipped config, as ``detectron2.model_zoo.get_config`` does for Detectron2's own.

    Args:
        name: path relative to ``configs/``, e.g. ``"detection/mask_rcnn_r50_fpn_4conv1fc.py"``, or
            one that begins with ``configs/`` or ``projects/``, e.g.
            ``"projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"``.

    Returns:
        A new config that the caller may change.

    Raises:
        UserError: there is no such config; the message lists the configs of that folder.
    """
    path = ROOT / name if name.startswith(("configs/", "projects/")) else CONFIG_ROOT / name
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"no config {name!r} in {path.parent}; its folder contains {near}")
    return LazyConfig.load(str(path))


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a config file, complete it and apply command-line overrides.

    Args:
        path: see :func:`load_file`.
        overrides: see :func:`override_config`; those of a yacs config (``MODEL.MASK_ON=False``) are
            applied before it is converted, all others after.

    Returns:
        The config. ``train`` has every key of ``configs/common/train.py``, so that each can be
        overridden; ``train.register`` has ``path`` if that file registers data sets.

    Raises:
        UserError: there is no such file, it cannot be loaded, or an override is invalid.
    """
    of_yacs, overrides = split_overrides(overrides)
    cfg = complete_train(load_file(path, of_yacs))
    if path.endswith(".py"):
        _warn_of_two_lengths(cfg, overrides, path)
    return override_config(cfg, overrides, path, of_yacs)


def _warn_of_two_lengths(cfg: DictConfig, overrides: Sequence[str], path: str) -> None:
    """Warn if a file has two lengths, one of them probably of the config that it begins with."""
    changed = {text.partition("=")[0] for text in overrides}
    epochs, max_iter = cfg.train.epochs, cfg.train.max_iter
    if None not in (epochs, max_iter) and changed.isdisjoint({"train.epochs", "train.max_iter"}):
        logger.warning(
            "%s: train.max_iter=%s is the length of the run, not train.epochs=%s; to train for "
            "epochs, set train.max_iter = None in the file",
            *(path, max_iter, epochs),
        )


def override_config(
    cfg: DictConfig, overrides: Sequence[str], path: str, of_yacs: Sequence[str] = ()
) -> DictConfig:
    """Apply command-line overrides, and what follows from them.

    - Other training data than the config's: the number of classes is that of the data, see
      :data:`NUM_CLASSES`, unless it is overridden as well.
    - ``train.epochs`` is the length, also of a config that has ``train.max_iter``, unless that is
      overridden as well, with a warning.
    - Paths in the names of data sets become absolute, so that the config has the same meaning in
      other processes and folders.
    - The files in ``train.register`` are executed.

    Args:
        cfg: changed in place; complete.
        overrides: see :func:`~region_pretrain.overrides.apply_overrides`.
        path: the file that it was loaded from.
        of_yacs: overrides that were applied before the config was converted.

    Returns:
        ``cfg``.

    Raises:
        UserError: an override is invalid, or a file in ``train.register`` fails.
    """
    refuse_converted_keys(cfg, overrides)
    apply_overrides(cfg, overrides)
    check_values(cfg, _train_defaults())
    changed = {text.partition("=")[0].lstrip("+~") for text in overrides}
    for key in {text.partition("=")[0] for text in of_yacs}:
        is_data = key == "DATASETS.TRAIN"
        changed.add("dataloader.train.dataset.names" if is_data else f"model.cfg.{key}")
    _follow_new_data(cfg, changed)
    if "train.epochs" in changed and cfg.train.epochs is not None:
        if changed.isdisjoint(_MAX_ITER):
            cfg.train.max_iter = None
        elif cfg.train.max_iter is not None:  # such as the images_seen of a sweep
            key = next(key for key in _MAX_ITER if key in changed).rpartition(".cfg.")[2]
            text = "%s=%s is the length of the run, not train.epochs=%s, which is set as well"
            logger.warning(f"{text}: remove one of them", key, cfg.train.max_iter, cfg.train.epochs)
    make_names_absolute(cfg)
    complete_register(cfg, path)
    return cfg


def check_parts(cfg: DictConfig, path: str, parts: Sequence[str] = TRAINED) -> None:
    """Refuse a config file without the parts that a command reads.

    Raises:
        UserError: they are missing or null.
    """
    if missing := [part for part in parts if OmegaConf.select(cfg, part) is None]:
        needed = f"a config needs {', '.join(parts)}, as LazyCalls or dicts of them"
        raise UserError(f"{path} has no {', '.join(missing)}: {needed}")


def check_pretraining(cfg: DictConfig) -> None:
    """Refuse a config that does not pre-train.

    Raises:
        UserError: it has no views.
    """
    if OmegaConf.select(cfg, "dataloader.train.dataset.views") is None:
        raise UserError("not a pre-training config: it has no dataloader.train.dataset.views")


def _follow_new_data(cfg: DictConfig, changed: set[str]) -> None:
    dataset = re.compile(r"dataloader(\.train(\.dataset(\.names(\.\d+)?)?)?)?")
    if changed.isdisjoint(NUM_CLASSES) and any(map(dataset.fullmatch, changed)):
        for key in num_classes_keys(cfg):
            OmegaConf.update(cfg, key, None)


def class_keys(cfg: DictConfig) -> tuple[str, ...]:
    """Where a detector of this kind has its number of classes."""
    architecture = OmegaConf.select(cfg, "model.cfg.MODEL.META_ARCHITECTURE")
    if architecture is None:
        return NUM_CLASSES[:3]
    if architecture in ("ProposalNetwork", "SemanticSegmentor"):
        return ()
    return NUM_CLASSES[4:] if architecture in ("RetinaNet", "FCOS") else NUM_CLASSES[3:4]


def num_classes_keys(cfg: DictConfig) -> list[str]:
    """Those of :data:`NUM_CLASSES` that a detection config has, without interpolations."""
    if not {"test", "evaluator"} & set(cfg.get("dataloader", {})):
        return []
    found = []
    for key in class_keys(cfg):
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(cfg, parent)
        if isinstance(node, DictConfig) and last in node.keys():
            value = node._get_node(last)._value()
            if value is None or isinstance(value, int):
                found.append(key)
    return found


def load_file(path: str, yacs_overrides: Sequence[str] = ()) -> DictConfig:
    """Load a config file without completing it.

    YAML is read safely: nothing that it names is called before the config is instantiated.

    Args:
        path: a LazyConfig (``.py``), the ``config.yaml`` of a run, or a yacs config (``.yaml``),
            which is converted; a path, or a name in Detectron2's model zoo.
        yacs_overrides: overrides of a yacs config.

    Raises:
        UserError: there is no such file, it cannot be loaded or converted, or an override is
            invalid.
    """
    if not path:
        raise UserError(
            "no config given: use --config-file PATH (or --method and --detector to pre-train)"
        )
    path = find_config_file(path)
    if not path.endswith((".py", ".yaml", ".yml")):
        raise UserError(f"{path} is not a config: its name must end with .py or .yaml")
    if is_yacs(path):
        return to_lazy_config(read_yacs(path, yacs_overrides))
    if yacs_overrides:
        instead = counterpart(yacs_overrides[0].lstrip("+").partition("=")[0])
        raise UserError(
            f"override {yacs_overrides[0]!r}: {path} is not a yacs config, and the keys of a "
            f"LazyConfig are in lower case{f': use {instead}' if instead else ''}"
        )
    try:
        if not path.endswith(".py"):
            return _from_yaml(path)
        with recording(path):
            cfg = LazyConfig.load(path)
        return refer_to_file(cfg, path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be loaded: {describe(error)}{path_hint(error)}") from error


def _from_yaml(path: str) -> DictConfig:
    with PathManager.open(path, "rb") as file:
        content = load_yaml(file.read().decode())
    if not isinstance(content, dict) or not isinstance(content.get("train", {}), dict):
        raise UserError(f"{path} is not a config: it must be a mapping, and its train as well")
    return OmegaConf.create(content, flags={"allow_objects": True})


def read_saved(path: str) -> dict[str, Any]:
    """Read the ``config.yaml`` of a run in its saved form, for :func:`changed_keys`.

    Names and objects are text: nothing is imported or called.

    Raises:
        UserError: the file cannot be read, or is not a run's config.
    """
    try:
        with PathManager.open(path, "rb") as file:
            content = load_plain_yaml(file.read().decode())
        if not isinstance(content, dict) or not isinstance(content.get("train"), dict):
            raise ValueError("it has no mapping called train")
    except Exception as error:  # damaged bytes raise many kinds of exceptions
        raise UserError(
            f"{path}, the config of the run in this folder, is damaged: {describe(error)}; restore "
            "it, or delete it to resume without comparing configs"
        ) from error
    return content


def complete_train(cfg: DictConfig) -> DictConfig:
    """Add the defaults of ``configs/common/train.py`` to ``cfg.train``.

    :func:`load_config` has done this for every config that comes from a file, and a complete config
    is returned unchanged. Detectron2's own configs have fewer keys.

    Args:
        cfg: changed in place.

    Returns:
        ``cfg``.

    Raises:
        UserError: see :func:`~region_pretrain.overrides.check_values`.
    """
    given, defaults = cfg.get("train", OmegaConf.create()), _train_defaults()
    for key in _keys(given) - _keys(defaults):
        _warn_of_typo(key)
    if not _keys(defaults) <= _keys(given):
        cfg.train = OmegaConf.merge(defaults, given)
    if cfg.train.init_checkpoint is None:  # as some of Detectron2's configs have it
        cfg.train.init_checkpoint = ""
    check_values(cfg, defaults)
    cfg.train.output_dir = os.path.expanduser(cfg.train.output_dir)
    return cfg


@functools.cache
def _warn_of_typo(key: str) -> None:
    """Warn once of a key that is probably misspelt. Others may be read by the user's own code."""
    known = _keys(_train_defaults())
    groups = {name.rpartition(".")[0] for name in known}
    if any(key.startswith(f"{name}.") for name in known - groups):  # in a list of the user's
        return
    for near in difflib.get_close_matches(key, known, 1, 0.85):
        logger.warning("train.%s has no effect; did you mean train.%s?", key, near)


@functools.cache
def _train_defaults() -> DictConfig:
    return get_config("common/train.py").train


def saved_train_defaults() -> dict[str, Any]:
    """The defaults of ``train``, in the form that :func:`read_saved` returns."""
    return load_plain_yaml(to_yaml(OmegaConf.create({"train": _train_defaults()})))["train"]


def _keys(cfg: DictConfig) -> set[str]:
    return set(dotted_keys(OmegaConf.to_container(cfg, resolve=False)))


def to_yaml(cfg: DictConfig) -> str:
    """A config as ``LazyConfig.save`` writes it.

    Raises:
        UserError: the config contains an object that YAML cannot represent, such as a lambda.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        LazyConfig.save(cfg, f"{_Utf8.PREFIX}{path}")
        if os.path.exists(f"{path}.pkl") or not os.path.exists(path):
            raise UserError(
                f"{', '.join(unsaveable(cfg)) or 'the config'} cannot be saved as YAML: "
                "use importable functions and classes instead of lambdas"
            )
        with open(path, encoding="utf-8") as f:
            return f.read()


def changed_keys(
    old: DictConfig | dict[str, Any], new: DictConfig | dict[str, Any]
) -> dict[str, tuple[str, str]]:
    """Compare two configs in their saved form, in which a class is its importable name.

    Args:
        old, new: configs, or what :func:`read_saved` returns.

    Returns:
        Dotted key of each leaf that differs -> (old, new) as text. A leaf that one of them lacks is
        ``(absent)`` there.
    """
    return _differences(
        *(cfg if isinstance(cfg, dict) else load_plain_yaml(to_yaml(cfg)) for cfg in (old, new))
    )


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
