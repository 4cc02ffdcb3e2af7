"""The functions that converted configs call."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone as build_registered_backbone
from detectron2.modeling import build_model
from detectron2.modeling.backbone import Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver.build import maybe_add_gradient_clipping
from omegaconf import DictConfig, OmegaConf
from torch import nn

from region_pretrain.errors import UserError

#: Type of a data set -> its evaluators.
_EVALUATORS: dict[str, list[type[DatasetEvaluator]]] = {
    "coco": [COCOEvaluator],
    "coco_panoptic_seg": [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator],
    "sem_seg": [SemSegEvaluator],
    "pascal_voc": [PascalVOCDetectionEvaluator],
    "cityscapes_instance": [CityscapesInstanceEvaluator],
    "cityscapes_sem_seg": [CityscapesSemSegEvaluator],
    "lvis": [LVISEvaluator],
}

#: Evaluator -> the package that it imports only when it is used.
_PACKAGES = {
    CityscapesInstanceEvaluator: "cityscapesscripts",
    CityscapesSemSegEvaluator: "cityscapesscripts",
    COCOPanopticEvaluator: "panopticapi",
    LVISEvaluator: "lvis",
}


def as_cfg_node(values: Mapping[str, Any]) -> CfgNode:
    """Detectron2's defaults with the given values, which may be a part of a config."""
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=True)
    cfg = get_cfg()
    cfg.set_new_allowed(True)  # keys of the user's own fork, for its own modules
    cfg.merge_from_other_cfg(CfgNode(values))
    cfg.MODEL.DEVICE = str(torch.empty(0).device)  # the current default: the CPU, or meta
    return cfg


def build_detector(cfg: Mapping[str, Any]) -> nn.Module:
    """``detectron2.modeling.build_model`` on the default device.

    Args:
        cfg: a yacs config as nested dicts.
    """
    with _resnet_errors(cfg):
        return build_model(as_cfg_node(cfg))


def build_resnet(cfg: Mapping[str, Any]) -> ResNet:
    """``detectron2.modeling.backbone.build_resnet_backbone`` for colour images.

    Args:
        cfg: a yacs config as nested dicts, of which ``MODEL.RESNETS`` and ``MODEL.BACKBONE``
            are used.
    """
    with _resnet_errors(cfg):
        return build_resnet_backbone(as_cfg_node(cfg), ShapeSpec(channels=3))


def build_backbone(cfg: Mapping[str, Any]) -> Backbone:
    """``detectron2.modeling.build_backbone``.

    Args:
        cfg: a complete yacs config as nested dicts.
    """
    with _resnet_errors(cfg):
        return build_registered_backbone(as_cfg_node(cfg))


#: Depths of Detectron2's ``build_resnet_backbone``.
_DEPTHS = (18, 34, 50, 101, 152)


@contextmanager
def _resnet_errors(cfg: Mapping[str, Any]) -> Iterator[None]:
    """Name a depth that Detectron2's ResNet lacks, and values that basic blocks do not have."""
    try:
        yield
    except KeyError as error:
        depth = cfg["MODEL"]["RESNETS"]["DEPTH"]
        if error.args != (depth,):
            raise
        depths = ", ".join(map(str, _DEPTHS))
        raise UserError(f"MODEL.RESNETS.DEPTH={depth}: expected one of {depths}") from error
    except AssertionError as error:
        found = re.match(r"Must set MODEL\.RESNETS\.(\w+) = (\d+) for R18/R34", str(error))
        if not found:
            raise
        key, needed = found.groups()
        values = cfg["MODEL"]["RESNETS"]
        raise UserError(
            f"MODEL.RESNETS.{key}={values[key]}: a ResNet with "
            f"MODEL.RESNETS.DEPTH={values['DEPTH']} needs MODEL.RESNETS.{key}={needed}"
        ) from error


def build_retinanet_head(cfg: Mapping[str, Any]) -> RetinaNetHead:
    """Detectron2's ``RetinaNetHead`` on the maps of an FPN.

    Args:
        cfg: a yacs config as nested dicts, of which ``MODEL.RETINANET``, ``MODEL.FPN`` and
            ``MODEL.ANCHOR_GENERATOR`` are used.
    """
    cfg = as_cfg_node(cfg)
    shapes = [
        ShapeSpec(channels=cfg.MODEL.FPN.OUT_CHANNELS, stride=2 ** int(name.removeprefix("p")))
        for name in cfg.MODEL.RETINANET.IN_FEATURES
    ]
    return RetinaNetHead(cfg, shapes)


def sgd_with_tensor_clipping(
    params: Iterable[Any], clip_norm: float, norm_type: float, **options: Any
) -> torch.optim.SGD:
    """SGD that clips the norm of each parameter's gradient, as ``SOLVER.CLIP_GRADIENTS`` does.

    Args:
        params: parameters or groups.
        clip_norm: maximum norm of each tensor.
        norm_type: the p of the norm.
        options: other arguments of ``torch.optim.SGD``.
    """
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.update(
        ENABLED=True, CLIP_TYPE="norm", CLIP_VALUE=clip_norm, NORM_TYPE=norm_type
    )
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD(params, **options))


def build_evaluator(
    dataset_name: str,
    output_dir: str,
    keypoint_oks_sigmas: Sequence[float] = (),
    tasks: Sequence[str] | None = None,
) -> DatasetEvaluator:
    """The evaluator of a data set's ``evaluator_type``, as in Detectron2's ``tools/train_net.py``.

    Args:
        dataset_name: a registered data set; without a type it is evaluated as COCO.
        output_dir: folder for predictions.
        keypoint_oks_sigmas: COCO's OKS sigmas of each keypoint; empty for those of COCO's persons.
        tasks: of COCO's evaluator, such as ``["bbox"]``; None for those that the detector predicts.

    Raises:
        UserError: the type is unknown, or needs a package that is not installed.
    """
    options: dict[type[DatasetEvaluator], dict[str, Any]] = {
        COCOEvaluator: {
            "output_dir": output_dir,
            "kpt_oks_sigmas": tuple(keypoint_oks_sigmas),
            "tasks": None if tasks is None else tuple(tasks),
        },
        SemSegEvaluator: {"output_dir": output_dir},
        COCOPanopticEvaluator: {"output_dir": output_dir},
        LVISEvaluator: {"output_dir": output_dir},
    }
    evaluators = [
        kind(dataset_name, **options.get(kind, {})) for kind in evaluator_classes(dataset_name)
    ]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def evaluator_classes(dataset_name: str) -> list[type[DatasetEvaluator]]:
    """The classes that :func:`build_evaluator` uses for a data set.

    Raises:
        UserError: the type is unknown, or needs a package that is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in _EVALUATORS:
        raise UserError(f"MetadataCatalog.get({dataset_name!r}).evaluator_type={kind} is unknown")
    check_packages(dataset_name, _EVALUATORS[kind])
    return _EVALUATORS[kind]


def check_packages(dataset_name: str, evaluators: Iterable[Any]) -> None:
    """Check that the packages of evaluators are installed.

    Args:
        dataset_name: the data set that they evaluate.
        evaluators: classes; those that are not derived from Detectron2's are ignored.

    Raises:
        UserError: a package is missing.
    """
    for kind in evaluators:
        bases = kind.__mro__ if isinstance(kind, type) else ()
        package = next((_PACKAGES[base] for base in bases if base in _PACKAGES), None)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{dataset_name} is evaluated by {kind.__name__}, which needs the package "
                f"{package}: install it"
            )
