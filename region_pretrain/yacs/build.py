"""The functions that converted configs call."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
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

#: Evaluator type -> packages that Detectron2's evaluator imports only when it is used.
_PACKAGES = {
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
    "coco_panoptic_seg": "panopticapi",
    "lvis": "lvis",
}


def as_cfg_node(values: Mapping[str, Any]) -> CfgNode:
    """Detectron2's defaults with the given values, which may be a part of a config."""
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=True)
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(values))
    cfg.MODEL.DEVICE = str(torch.empty(0).device)  # the current default: the CPU, or meta
    return cfg


def build_detector(cfg: Mapping[str, Any]) -> nn.Module:
    """``detectron2.modeling.build_model`` on the default device.

    Args:
        cfg: a yacs config as nested dicts.
    """
    return build_model(as_cfg_node(cfg))


def build_resnet(cfg: Mapping[str, Any]) -> ResNet:
    """``detectron2.modeling.backbone.build_resnet_backbone`` for colour images.

    Args:
        cfg: a yacs config as nested dicts, of which ``MODEL.RESNETS`` and ``MODEL.BACKBONE``
            are used.
    """
    return build_resnet_backbone(as_cfg_node(cfg), ShapeSpec(channels=3))


def build_backbone(cfg: Mapping[str, Any]) -> Backbone:
    """``detectron2.modeling.build_backbone``.

    Args:
        cfg: a complete yacs config as nested dicts.
    """
    return build_registered_backbone(as_cfg_node(cfg))


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
    dataset_name: str, output_dir: str, keypoint_oks_sigmas: Sequence[float] = ()
) -> DatasetEvaluator:
    """The evaluator of a data set's ``evaluator_type``, as in Detectron2's ``tools/train_net.py``.

    Args:
        dataset_name: a registered data set; without a type it is evaluated as COCO.
        output_dir: folder for predictions.
        keypoint_oks_sigmas: COCO's OKS sigmas of each keypoint; empty for those of COCO's persons.

    Raises:
        UserError: the type is unknown, or needs a package that is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    package = _PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"{dataset_name} is evaluated with {package}, which is not installed")
    evaluators: list[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(SemSegEvaluator(dataset_name, distributed=True, output_dir=output_dir))
    if kind in ("coco", "coco_panoptic_seg"):
        sigmas = tuple(keypoint_oks_sigmas)
        evaluators.append(COCOEvaluator(dataset_name, output_dir=output_dir, kpt_oks_sigmas=sigmas))
    if kind == "coco_panoptic_seg":
        evaluators.append(COCOPanopticEvaluator(dataset_name, output_dir))
    elif kind == "cityscapes_instance":
        evaluators.append(CityscapesInstanceEvaluator(dataset_name))
    elif kind == "cityscapes_sem_seg":
        evaluators.append(CityscapesSemSegEvaluator(dataset_name))
    elif kind == "pascal_voc":
        evaluators.append(PascalVOCDetectionEvaluator(dataset_name))
    elif kind == "lvis":
        evaluators.append(LVISEvaluator(dataset_name, output_dir=output_dir))
    if not evaluators:
        raise UserError(f"MetadataCatalog.get({dataset_name!r}).evaluator_type={kind} is unknown")
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
