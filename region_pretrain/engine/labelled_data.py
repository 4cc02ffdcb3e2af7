"""Checks a detection config against its data sets, which also give the number of classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.cityscapes_evaluation import CityscapesEvaluator
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf

from region_pretrain.config import NUM_CLASSES, class_keys, num_classes_keys
from region_pretrain.data.catalog import check_registered
from region_pretrain.data.evaluators import evaluators_of
from region_pretrain.data.folder import FOLDER_PREFIX
from region_pretrain.data.inspection import check_labels, prepare_labels
from region_pretrain.data.other_labels import check_other_heads
from region_pretrain.data.sources import register_named
from region_pretrain.engine.transfer import CLASS_LAYERS, TransferReport
from region_pretrain.errors import UserError, first_few
from region_pretrain.modeling.detector import check_input_format
from region_pretrain.overrides import dotted_keys, target_of
from region_pretrain.yacs.build import check_packages

logger = logging.getLogger(__name__)

_SHOWN = 20


class Classes(NamedTuple):
    """The classes of a detector's data.

    Attributes:
        names: their names, in the order of ``category_id``; empty if the data set has none.
        datasets: the data sets.
        followed: keys of the config that were null and are now the number of names.
        lines: what the log says about the labels.
    """

    names: list[str]
    datasets: list[str]
    followed: list[str]
    lines: tuple[str, ...] = ()

    def log(self) -> None:
        """Log what the data contain, the names, and which keys follow from them."""
        for line in self.lines:
            logger.info("%s", line)
        if self.names:
            keys = "".join(
                f"{key}={len(self.names)} follows from the data; " for key in self.followed
            )
            logger.info("%s%d classes: %s", keys, len(self.names), _shown(self.names))


def check_labelled_data(cfg: DictConfig, training: bool, fix: bool = True) -> Classes:
    """Check a detection config's data sets before anything is computed; complete its model.

    Keys of :data:`~region_pretrain.config.NUM_CLASSES` that are null become the number of
    ``thing_classes`` of the training data, or of the test data in an evaluation. Numbers are
    compared with it. If the config has a data set or mapper of the user's own, which may map the
    classes, a difference is only a warning. The heads within the RoI heads must have their number.

    Args:
        cfg: changed in place; complete.
        training: whether the detector is trained, not only evaluated.
        fix: read all labels, fix them where possible, and check them; False: check those of data
            sets named by path only.

    Raises:
        UserError: the config is for pre-training; a data set is unknown, unlabelled or unreadable;
            the classes of the config, its heads, the training data and the test data differ; an
            evaluator needs a package that is not installed; or see
            :func:`~region_pretrain.modeling.detector.check_input_format`.
    """
    if "evaluator" not in cfg.dataloader and "test" not in cfg.dataloader:
        raise UserError(
            "the config has no dataloader.test, so it is not a detection config "
            "(pre-training configs are for region-pretrain pretrain)"
        )
    check_input_format(cfg)
    register_named(cfg)
    splits = ("train", "test") if training else ("test",)
    names = {split: _dataset_names(cfg, split) for split in splits}
    _check_evaluators(cfg, names["test"])
    check_other_heads(cfg, names[splits[0]])
    with missing_files_are_user_errors():
        # Before Detectron2 loads what may need fixing.
        lines = prepare_labels(cfg, names) if fix else []
        classes = {split: classes_of(f"dataloader.{split}", names[split]) for split in splits}
        if not fix:
            check_labels(cfg, names)
    first = splits[0]
    own = _maps_classes(cfg)
    if training and (difference := difference_of(classes["train"], classes["test"])):
        _refuse(
            f"the classes of {_shown(names['train'])} (training) and {_shown(names['test'])} "
            f"(test) differ: {difference}",
            own,
        )
    followed = _compare_number(cfg, classes[first], names[first], own)
    _compare_heads(cfg)
    return Classes(classes[first], names[first], followed, tuple(lines))


@contextmanager
def missing_files_are_user_errors() -> Iterator[None]:
    """Turn an ``OSError`` into one line about the data set's folder; also a missing package."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"the data set cannot be read: {error}: install this package") from error
    except OSError as error:
        raise UserError(
            f"the data set cannot be read: {error}; built-in data sets are expected in the folder "
            "that the environment variable DETECTRON2_DATASETS names"
        ) from error


def compare_with_checkpoint(report: TransferReport, classes: Classes, training: bool) -> None:
    """Compare the class names in a checkpoint with those of the data.

    Args:
        report: what was loaded.
        classes: the data's.
        training: warn instead of raising an error, and only if the checkpoint's predictors are
            used: a fine-tuning may learn other classes.

    Raises:
        UserError: they differ.
    """
    predicts = any(layer in name for name in report.matched for layer in CLASS_LAYERS)
    if training and not (predicts and len(report.classes) == len(classes.names)):
        return
    if difference := difference_of(report.classes, classes.names):
        _refuse(
            f"{report.path} was trained on other classes than those of "
            f"{_shown(classes.datasets)}: {difference}",
            training,
        )


def _check_evaluators(cfg: DictConfig, names: Sequence[str]) -> None:
    """Find missing packages now, not after the training, and too many machines."""
    for evaluator in evaluators_of(cfg):
        for name in names:
            check_packages(name, evaluator.classes(name))
            if evaluator.is_a(CityscapesEvaluator, name):
                if comm.get_local_size() != comm.get_world_size():
                    raise UserError(
                        f"{name}: Detectron2's evaluation of Cityscapes needs all processes on one "
                        "machine: train on one"
                    )


def _refuse(message: str, only_warn: bool) -> None:
    if not only_warn:
        raise UserError(message)
    logger.warning("%s", message)


def _dataset_names(cfg: DictConfig, split: str) -> list[str]:
    """The data sets of a loader; none if the loader does not name them."""
    loader = cfg.dataloader.get(split)
    dataset = loader.get("dataset") if isinstance(loader, DictConfig) else None
    if not isinstance(dataset, DictConfig) or "names" not in dataset:
        return []
    if split == "test" and isinstance(dataset.names, ListConfig):
        if len(dataset.names) > 1 and "evaluator" in cfg.dataloader:
            raise UserError(
                f"dataloader.test.dataset.names={list(dataset.names)}: an evaluation is of one "
                "data set; name one of them"
            )
        if len(dataset.names) == 1:  # the evaluator's name refers to it
            dataset.names = dataset.names[0]
    names = instantiate(dataset.names)
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name.startswith(FOLDER_PREFIX):
            raise UserError(
                f"dataloader.{split}.dataset.names={name}: a folder has no boxes; fine-tuning "
                "needs annotations: coco://ANN.json?images=DIR, voc://ROOT?split=NAME, or the name "
                "of a registered data set"
            )
        check_registered(name)
    return names


def classes_of(key: str, names: Sequence[str]) -> list[str]:
    """The class names that all data sets have; empty if they have none.

    Args:
        key: what names the data sets, for the message.
        names: registered.

    Raises:
        UserError: they differ.
    """
    found = [list(MetadataCatalog.get(name).get("thing_classes") or _load(name)) for name in names]
    for name, classes in zip(names[1:], found[1:], strict=True):
        if difference := difference_of(found[0], classes):
            raise UserError(f"{key}: the classes of {names[0]} and {name} differ: {difference}")
    return next(filter(None, found), [])


def _load(name: str) -> list[str]:
    """The class names of a data set that has them only once it is loaded."""
    DatasetCatalog.get(name)
    return list(MetadataCatalog.get(name).get("thing_classes", ()))


def difference_of(one: Sequence[str], other: Sequence[str]) -> str:
    """The first difference of two lists of classes; empty if one is unknown."""
    if not one or not other or list(one) == list(other):
        return ""
    i, pair = next((i, p) for i, p in enumerate(zip_longest(one, other)) if p[0] != p[1])
    numbers = f"{len(one)} and {len(other)} classes; " if len(one) != len(other) else ""
    shown = " and ".join("missing" if name is None else repr(name) for name in pair)
    return f"{numbers}class {i} is {shown}"


def _maps_classes(cfg: DictConfig) -> bool:
    """Whether a data set or mapper is neither Detectron2's nor ours."""
    for split in ("train", "test"):
        loader = cfg.dataloader.get(split)
        for part in ("dataset", "mapper"):
            if _is_own(loader.get(part) if isinstance(loader, DictConfig) else None):
                return True
    return False


def _is_own(lazy: object) -> bool:
    """Whether a part's class is neither Detectron2's nor ours."""
    target = target_of(lazy)
    module = getattr(target, "__module__", None) or ""
    return target is not None and not module.startswith(("detectron2.", "region_pretrain."))


def _compare_heads(cfg: DictConfig) -> None:
    """Compare the numbers of classes within the RoI heads with that of the RoI heads."""
    number = OmegaConf.select(cfg, NUM_CLASSES[0])
    if not isinstance(number, int):
        return
    heads = cfg.model.roi_heads
    for key in dotted_keys(OmegaConf.to_container(heads, resolve=False)):
        part, _, last = key.rpartition(".")
        found = OmegaConf.select(heads, key) if part and last == "num_classes" else None
        agnostic = found == 1 and not part.startswith("box_predictor")  # e.g. a mask head
        if isinstance(found, int) and found != number and not agnostic:
            path = f"model.roi_heads.{key}"
            _refuse(
                f"{path}={found}, but {NUM_CLASSES[0]}={number}: set {path}={number}",
                _is_own(OmegaConf.select(heads, part)),
            )


def _compare_number(
    cfg: DictConfig, classes: Sequence[str], names: Sequence[str], own: bool
) -> list[str]:
    """Fill in the null keys, compare the others; returns the keys that were null."""
    followed = []
    for key in num_classes_keys(cfg):
        number = OmegaConf.select(cfg, key)
        if number is None and classes:
            OmegaConf.update(cfg, key, len(classes))
            followed.append(key)
        elif number is None:
            raise UserError(
                f"{key} is null, but {_shown(names) or 'dataloader.train'} has no class names "
                f"(thing_classes): set {key}=NUMBER"
            )
    for key in class_keys(cfg):
        number = OmegaConf.select(cfg, key)
        if not isinstance(number, int) or not names:
            continue
        shown = key.rpartition(".cfg.")[2]  # of a yacs config: as an override
        if classes and number != len(classes):
            _refuse(
                f"{shown}={number}, but {_shown(names)} has {len(classes)} classes "
                f"({_shown(classes)}): set {shown}={len(classes)}"
                f"{', or null to follow the data' if shown == key else ''}",
                own,
            )
        elif not classes and (count := _count(names)) > number:
            _refuse(
                f"{shown}={number}, but {_shown(names)} has boxes with category_id={count - 1}: "
                f"set {shown}={count} or more",
                own,
            )
    return followed


def _count(names: Sequence[str]) -> int:
    """One more than the largest ``category_id``."""
    records = (record for name in names for record in DatasetCatalog.get(name))
    ids = (box["category_id"] for record in records for box in record.get("annotations", ()))
    return 1 + max(ids, default=-1)


def _shown(names: Sequence[str]) -> str:
    return first_few(names, _SHOWN)
