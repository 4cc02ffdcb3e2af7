"""Narrow versions of the detectors that methods pre-train, as lazy configs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import (
    FPN,
    BasicStem,
    MViT,
    RegNet,
    ResNet,
    SwinTransformer,
    ViT,
)
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from omegaconf import DictConfig
from torch import nn

from region_pretrain.modeling.timm_backbone import TimmBackbone

WIDTH = 16
STAGES = [(8, 8, 1), (8, 16, 2), (16, 24, 2), (24, 32, 2)]


def _zoo(name: str) -> DictConfig:
    return model_zoo.get_config(f"common/models/{name}.py").model


def _stages() -> list:
    from detectron2.modeling.backbone.resnet import BasicBlock

    return [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[stride],
            in_channels=inputs,
            out_channels=outputs,
            norm="BN",
        )
        for inputs, outputs, stride in STAGES
    ]


def _narrow_resnet(model: DictConfig) -> DictConfig:
    bottom_up = model.backbone.bottom_up
    bottom_up.stem.update(out_channels=8, norm="BN")
    bottom_up.stages = _stages()
    bottom_up.freeze_at = 0
    model.backbone.update(out_channels=WIDTH)
    return model


def _narrow_rcnn(model: DictConfig, convolutions: int = 0) -> DictConfig:
    model.proposal_generator.head.in_channels = WIDTH
    heads = model.roi_heads
    heads.num_classes = 3
    found = heads.box_heads if "box_heads" in heads else [heads.box_head]
    for head in found:
        head.input_shape = ShapeSpec(channels=WIDTH, height=7, width=7)
        head.update(conv_dims=[12] * convolutions, fc_dims=[24, 24])
    predictors = heads.box_predictors if "box_predictors" in heads else [heads.box_predictor]
    for predictor in predictors:
        predictor.input_shape = ShapeSpec(channels=24)
    shape = ShapeSpec(channels=WIDTH, height=14, width=14)
    if "mask_head" in heads:
        heads.mask_head.update(input_shape=shape, conv_dims=[8, 8])
    if "keypoint_head" in heads:
        heads.keypoint_head.update(input_shape=shape, conv_dims=[8])
    return model


def _rcnn(name: str = "mask_rcnn_fpn", convolutions: int = 0) -> DictConfig:
    return _narrow_rcnn(_narrow_resnet(_zoo(name)), convolutions)


def _dense(name: str, norm: str = "") -> DictConfig:
    model = _narrow_resnet(_zoo(name))
    model.backbone.top_block.in_channels = WIDTH if name == "fcos" else 32
    model.head.input_shape = [ShapeSpec(channels=WIDTH)] * 5
    model.head.conv_dims = [32, 32]
    if norm:
        model.head.norm = norm
    return model


def _c4() -> DictConfig:
    model = _zoo("mask_rcnn_c4")
    model.backbone.stem.update(out_channels=8, norm="BN")
    model.backbone.stages = _stages()[:3]
    model.backbone.freeze_at = 0
    model.proposal_generator.head.in_channels = 24
    heads = model.roi_heads
    heads.res5.update(in_channels=24, out_channels=32, bottleneck_channels=8, norm="BN")
    heads.box_predictor.input_shape = ShapeSpec(channels=32)
    heads.mask_head.input_shape = ShapeSpec(channels=32, width=7, height=7)
    heads.mask_head.conv_dims = [8]
    return model


def _with_trunk(trunk: DictConfig, names: list[str]) -> DictConfig:
    """The Mask R-CNN with another trunk below its FPN."""
    model = _narrow_rcnn(_zoo("mask_rcnn_fpn"))
    model.backbone = L(FPN)(
        bottom_up=trunk, in_features=names, out_channels=WIDTH, top_block=L(LastLevelMaxPool)()
    )
    return model


def _swin() -> DictConfig:
    trunk = L(SwinTransformer)(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, drop_path_rate=0.1
    )
    return _with_trunk(trunk, ["p0", "p1", "p2", "p3"])


def _mvit() -> DictConfig:
    trunk = L(MViT)(
        embed_dim=8, depth=4, num_heads=1, last_block_indexes=(0, 1, 2, 3), drop_path_rate=0.1
    )
    return _with_trunk(trunk, ["scale2", "scale3", "scale4", "scale5"])


def _timm(name: str, **options) -> DictConfig:
    trunk = L(TimmBackbone)(name=name, drop_path_rate=0.1, **options)
    return _with_trunk(trunk, ["res2", "res3", "res4", "res5"])


def _timm_vit() -> DictConfig:
    model = _vitdet()
    model.backbone.net = L(TimmBackbone)(
        name="vit_tiny_patch16_224", embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.1
    )
    model.backbone.in_feature = "res4"
    return model


def _regnet() -> DictConfig:
    trunk = L(RegNet)(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=8,
        w_a=16.0,
        w_0=8,
        w_m=2.0,
        group_width=8,
        norm="BN",
        out_features=["s1", "s2", "s3", "s4"],
    )
    return _with_trunk(trunk, ["s1", "s2", "s3", "s4"])


def _vitdet() -> DictConfig:
    model = _narrow_rcnn(_zoo("mask_rcnn_vitdet"), convolutions=2)
    model.backbone.out_channels = WIDTH
    model.backbone.square_pad = 0
    model.backbone.net.update(
        embed_dim=16, depth=2, num_heads=2, window_block_indexes=[0], img_size=224, window_size=7
    )
    return model


def _plain_vit() -> DictConfig:
    """A C4-like Faster R-CNN on a plain ViT: one map of stride 16, and a box head."""
    model = _rcnn()
    model.backbone = L(ViT)(
        img_size=224,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[0],
        window_size=7,
        out_feature="last_feat",
    )
    model.proposal_generator.in_features = ["last_feat"]
    model.proposal_generator.anchor_generator.update(sizes=[[32, 64, 128]], strides=[16])
    model.proposal_generator.head.num_anchors = 9
    for pooler, names in (("box_pooler", "box_in_features"), ("mask_pooler", "mask_in_features")):
        model.roi_heads[pooler].scales = (1 / 16,)
        model.roi_heads[names] = ["last_feat"]
    return model


def _dc5() -> DictConfig:
    """A dilated C5 detector: its regions are pooled from res5."""
    model, stages = _rcnn(), _stages()
    stages[-1].update(out_channels=WIDTH, stride_per_block=[1])
    model.backbone = L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
        stages=stages,
        out_features=["res5"],
    )
    model.proposal_generator.in_features = ["res5"]
    model.proposal_generator.anchor_generator.update(sizes=[[32, 64, 128]], strides=[16])
    model.proposal_generator.head.num_anchors = 9
    for pooler, names in (("box_pooler", "box_in_features"), ("mask_pooler", "mask_in_features")):
        model.roi_heads[pooler].scales = (1 / 16,)
        model.roi_heads[names] = ["res5"]
    return model


#: Name -> function that creates the config.
DETECTORS: dict[str, Callable[[], DictConfig]] = {
    "Faster/Mask R-CNN, FPN": _rcnn,
    "Mask R-CNN, FPN, convolutions in the box head": partial(_rcnn, convolutions=2),
    "Keypoint R-CNN, FPN": partial(_rcnn, "keypoint_rcnn_fpn"),
    "Panoptic FPN": partial(_rcnn, "panoptic_fpn"),
    "Cascade R-CNN, FPN": partial(_rcnn, "cascade_rcnn"),
    "Cascade R-CNN, FPN, convolutions in the box heads": partial(_rcnn, "cascade_rcnn", 2),
    "RetinaNet": partial(_dense, "retinanet"),
    "FCOS": partial(_dense, "fcos"),
    "C4": _c4,
    "DC5": _dc5,
    "ViTDet": _vitdet,
    "plain ViT": _plain_vit,
    "Swin, FPN": _swin,
    "MViTv2, FPN": _mvit,
    "RegNet, FPN": _regnet,
    "timm's ConvNeXt, FPN": partial(
        _timm, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)
    ),
    "timm's Swin, FPN": partial(
        _timm,
        "swin_tiny_patch4_window7_224",
        embed_dim=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        window_size=4,
    ),
    "timm's ResNeSt, FPN": partial(_timm, "resnest14d", stem_width=8, channels=(8, 16, 24, 32)),
    "timm's EfficientNet, FPN": partial(_timm, "efficientnet_b0"),
    "timm's ViT, simple pyramid": _timm_vit,
}
