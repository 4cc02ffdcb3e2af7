"""Detectors as arguments: configs of every kind, and built modules."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from omegaconf import DictConfig, OmegaConf
from torch import nn

from region_pretrain.config import complete_train, get_config, load_file, override_config
from region_pretrain.errors import UserError
from region_pretrain.modeling.given import as_lazy_detector, given_part, refer_to
from region_pretrain.modeling.preprocess import channel_order
from region_pretrain.yacs import (
    find_config_file,
    is_yacs,
    override_yacs,
    read_yacs,
    split_overrides,
    to_lazy_config,
)

#: A detection config (a ``.py``, a ``.yaml``, the ``config.yaml`` of a run, a name in Detectron2's
#: model zoo; a loaded LazyConfig, only its ``model``, or a yacs ``CfgNode``), or a built detector.
AnyDetector = Any

#: The config of a run's detector, in the output folder of its pre-training.
DETECTOR_FILE = "detector.yaml"


def plain(detector: AnyDetector) -> str | DictConfig | CfgNode | nn.Module:
    """The argument with paths as text.

    Raises:
        UserError: it is of another type.
    """
    if isinstance(detector, os.PathLike):
        return os.fspath(detector)
    if not isinstance(detector, str | DictConfig | CfgNode | nn.Module):
        raise UserError(
            f"detector={detector!r}: must be a config (a path, a name in Detectron2's model zoo, a "
            "LazyConfig or a CfgNode) or a built detector"
        )
    return detector


def detection_config(detector: AnyDetector, overrides: Sequence[str] = ()) -> DictConfig:
    """A complete config for fine-tuning a detector, which the caller may change.

    A built detector and a bare ``model`` are trained on boxes, and on masks if they have a mask
    head, with Detectron2's augmentation and 1x schedule.

    Args:
        detector: see :data:`AnyDetector`.
        overrides: ``key=value``, also with keys of a yacs config.

    Raises:
        UserError: the config cannot be loaded or converted, or is not one of a detector; an
            override is invalid.
    """
    upper, rest = split_overrides(overrides)
    return override_config(load_detection_config(detector, upper), rest, "")


def load_detection_config(detector: AnyDetector, yacs_overrides: Sequence[str] = ()) -> DictConfig:
    """:func:`detection_config` without running the code of its ``train.register``.

    Raises:
        UserError: the config cannot be loaded or converted, or is not one of a detector.
    """
    detector = of_yacs(plain(detector), yacs_overrides)
    if yacs_overrides and not isinstance(detector, CfgNode):
        raise UserError(f"override {yacs_overrides[0]!r}: the detector is not a yacs config")
    if isinstance(detector, str):
        cfg = load_file(detector)
    elif isinstance(detector, CfgNode):
        cfg = to_lazy_config(_with_data(detector))
    elif isinstance(detector, DictConfig) and "model" in detector:
        cfg = copy.deepcopy(detector)
    else:
        cfg = _around(detector)
    if "dataloader" not in cfg or not {"test", "evaluator"} & set(cfg.dataloader):
        raise UserError("detector: not a detection config, which has dataloader.test")
    return complete_train(cfg)


def of_yacs(detector: AnyDetector, overrides: Sequence[str] = ()) -> AnyDetector:
    """The config that a yacs file contains, or a copy of a ``CfgNode``, with overrides.

    Any other detector is returned as it is.
    """
    if isinstance(detector, CfgNode):
        return override_yacs(detector.clone(), overrides)
    if isinstance(detector, str) and is_yacs(path := find_config_file(detector)):
        return read_yacs(path, overrides)
    return detector


def _with_data(cfg: CfgNode) -> CfgNode:
    """A yacs config with the numbers of data sets that a LazyConfig has: others may replace them.

    Detectron2's defaults and its tutorial have none.
    """
    if cfg.DATASETS.TRAIN and len(cfg.DATASETS.TEST) == 1:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TRAIN or ("(none: pass train=)",)
    if len(cfg.DATASETS.TEST) != 1:
        cfg.DATASETS.TEST = ("(not one: pass val=)",)
    return cfg


def _around(model: DictConfig | nn.Module) -> DictConfig:
    if isinstance(model, nn.Module):
        facts = as_lazy_detector(model)  # refuses other modules
        heads = getattr(model, "roi_heads", None)
        has_masks = bool(getattr(heads, "mask_on", False))
        has_keypoints = bool(getattr(heads, "keypoint_on", False))
        lazy, image_format = L(given_part)(detector=refer_to(model)), facts.input_format
    else:
        lazy = copy.deepcopy(model)
        has_masks = OmegaConf.select(model, "roi_heads.mask_head") is not None
        has_keypoints = OmegaConf.select(model, "roi_heads.keypoint_head") is not None
        image_format = channel_order(model.get("input_format"), model.get("pixel_mean"))
    if has_keypoints:
        raise UserError(
            "the detector has a keypoint head: pass its complete config, whose mapper says which "
            "keypoints a horizontal flip exchanges"
        )
    dataloader = get_config("common/data/coco.py").dataloader
    dataloader.train.mapper.update(image_format=image_format, use_instance_mask=has_masks)
    train = get_config("common/train.py").train
    train.max_iter, train.base_batch_size = 90_000, 16
    return DictConfig(
        dict(
            model=lazy,
            dataloader=dataloader,
            optimizer=get_config("common/optim.py").sgd,
            lr_multiplier=get_config("common/schedule.py").detection_1x,
            train=train,
        ),
        flags={"allow_objects": True},
    )
