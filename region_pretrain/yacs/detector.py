"""The pre-trainable modules of a yacs config as lazy objects, with the names of LazyConfigs."""

from __future__ import annotations

import json
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, BottleneckBlock, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from omegaconf import DictConfig

from region_pretrain.errors import UserError
from region_pretrain.yacs.build import build_backbone, build_resnet, build_retinanet_head

_RESNETS = (
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
)
_ROI_HEADS = ("StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads")
_BOX_HEADS = ("FastRCNNConvFCHead", "")  # a C4 detector has none


def lazy_detector(cfg: CfgNode) -> DictConfig:
    """The modules of a detector that can be pre-trained, as in ``model`` of a LazyConfig.

    Args:
        cfg: a complete yacs config of an R-CNN with FPN, C4 or dilated C5, of a Cascade R-CNN or of
            a RetinaNet. Its backbone may be any in Detectron2's registry, and is built once on the
            default device, for its feature maps.

    Returns:
        ``backbone``, ``pixel_mean``, ``pixel_std``, ``input_format`` and, of an R-CNN,
        ``roi_heads`` with pooler and ``box_head``, ``box_heads`` (Cascade R-CNN) or ``res5``, of a
        RetinaNet ``head``. Names of parameters are those of ``detectron2.modeling.build_model``.

    Raises:
        UserError: unknown backbone, RoI heads or box head; the message names the key.
    """
    detector = dict(
        backbone=_backbone(cfg),
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
        input_format=cfg.INPUT.FORMAT,
    )
    name = cfg.MODEL.META_ARCHITECTURE
    # That of a fork may be a subclass. Its own heads are not known, but its trunk is.
    kind = dict(iter(META_ARCH_REGISTRY)).get(name)
    kind = kind if isinstance(kind, type) else type(None)
    known = cfg.MODEL.ROI_HEADS.NAME in _ROI_HEADS and cfg.MODEL.ROI_BOX_HEAD.NAME in _BOX_HEADS
    if name in ("GeneralizedRCNN", "PanopticFPN") or known and issubclass(kind, GeneralizedRCNN):
        detector["roi_heads"] = _roi_heads(cfg)
    elif issubclass(kind, RetinaNet):
        part = {key: plain(cfg.MODEL[key]) for key in ("RETINANET", "ANCHOR_GENERATOR", "FPN")}
        detector["head"] = L(build_retinanet_head)(cfg={"MODEL": part})
    return DictConfig(detector, flags={"allow_objects": True})


def plain(cfg: CfgNode) -> dict[str, Any]:
    """A yacs config as nested dicts and lists."""
    return json.loads(json.dumps(cfg))


def _backbone(cfg: CfgNode) -> DictConfig:
    name, fpn = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN
    if name not in _RESNETS:
        known = {built for built, _ in BACKBONE_REGISTRY}
        _check("MODEL.BACKBONE.NAME", name, (*_RESNETS, *sorted(known - {*_RESNETS})))
        return L(build_backbone)(cfg=plain(cfg))
    part = {key: plain(cfg.MODEL[key]) for key in ("BACKBONE", "RESNETS")}
    trunk = L(build_resnet)(cfg={"MODEL": part})
    if name == "build_resnet_backbone":
        return trunk
    top_block = L(LastLevelMaxPool)()
    if name == "build_retinanet_resnet_fpn_backbone":
        top_block = L(LastLevelP6P7)(
            in_channels=_channels(cfg, 5), out_channels="${..out_channels}"
        )
    return L(FPN)(
        bottom_up=trunk,
        in_features=list(fpn.IN_FEATURES),
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=top_block,
        fuse_type=fpn.FUSE_TYPE,
    )


def _roi_heads(cfg: CfgNode) -> dict[str, Any]:
    _check("MODEL.ROI_HEADS.NAME", cfg.MODEL.ROI_HEADS.NAME, _ROI_HEADS)
    box, features = cfg.MODEL.ROI_BOX_HEAD, list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    shapes = _feature_maps(cfg)
    if missing := [name for name in features if name not in shapes]:
        raise UserError(
            f"MODEL.ROI_HEADS.IN_FEATURES={features}: {cfg.MODEL.BACKBONE.NAME} has no "
            f"{', '.join(missing)}, but {', '.join(shapes)}"
        )
    size = box.POOLER_RESOLUTION
    pooler = L(ROIPooler)(
        output_size=size,
        scales=[1.0 / shapes[name].stride for name in features],
        sampling_ratio=box.POOLER_SAMPLING_RATIO,
        pooler_type=box.POOLER_TYPE,
    )
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
        return dict(in_features=features, pooler=pooler, res5=_res5(cfg))
    heads = dict(box_in_features=features, box_pooler=pooler)
    _check("MODEL.ROI_BOX_HEAD.NAME", box.NAME, ("FastRCNNConvFCHead",))
    channels = shapes[features[0]].channels
    box_head = L(FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels=channels, height=size, width=size),
        conv_dims=[box.CONV_DIM] * box.NUM_CONV,
        fc_dims=[box.FC_DIM] * box.NUM_FC,
        conv_norm=box.NORM,
    )
    if cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":
        return heads | {"box_heads": [box_head] * len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)}
    return heads | {"box_head": box_head}


def _res5(cfg: CfgNode) -> DictConfig:
    """``Res5ROIHeads._build_res5_block``, lazily."""
    resnet = cfg.MODEL.RESNETS
    return L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=3,
        stride_per_block=[2, 1, 1],
        in_channels=_channels(cfg, 4),
        bottleneck_channels=resnet.NUM_GROUPS * resnet.WIDTH_PER_GROUP * 8,
        out_channels=_channels(cfg, 5),
        num_groups=resnet.NUM_GROUPS,
        norm=resnet.NORM,
        stride_in_1x1=resnet.STRIDE_IN_1X1,
    )


def _channels(cfg: CfgNode, stage: int) -> int:
    return cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2 ** (stage - 2)


def _feature_maps(cfg: CfgNode) -> dict[str, ShapeSpec]:
    """Names, channels and strides of the backbone's feature maps."""
    with torch.random.fork_rng([]):
        return build_backbone(plain(cfg)).output_shape()


def _check(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"{key}={value} cannot be converted for pre-training; known are {', '.join(known)}: "
            "write the detector as a LazyConfig"
        )
