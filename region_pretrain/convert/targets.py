"""The configuration that exported weights need in their target, from shapes and facts.

Lines for torchvision and timm are Python that builds the network, those for mmdetection are its
config, those for Detectron2 are overrides of a LazyConfig and of a yacs config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from region_pretrain.convert.facts import FROZEN, Facts
from region_pretrain.convert.layout import (
    BOX,
    FC_DIM,
    MASK,
    ResNetLayout,
    box_layers,
    is_bottleneck,
    is_fcos,
    numbered,
    rows,
    trunk_kind,
)
from region_pretrain.convert.lines import not_filled, stride_lines, unknown_pixels, values
from region_pretrain.convert.timm_target import timm_lines
from region_pretrain.convert.torchvision_target import torchvision_lines

_NORMS = {
    "SyncBatchNorm": "SyncBN",
    "NaiveSyncBatchNorm": "SyncBN",
    "FrozenBatchNorm2d": "FrozenBN",
}


def _mmdet(tensors: Mapping[str, Tensor], facts: Facts, state: Sequence[str]) -> list[str]:
    net = ResNetLayout(tensors)
    lines = [*unknown_pixels(facts), *stride_lines(facts, net)]
    if not unknown_pixels(facts):
        lines.append(
            f"data_preprocessor = dict(type='DetDataPreprocessor', mean={values(facts.pixel_mean)}"
            f", std={values(facts.pixel_std)}, bgr_to_rgb={facts.input_format == 'RGB'}, "
            "pad_size_divisor=32)  # images are read as BGR"
        )
    if net.depth is None:
        lines.append(f"# no depth of mmdetection has the blocks {net.blocks} of {net.block}")
    grouped = f", groups={net.groups}, base_width={net.group_width}" if net.groups > 1 else ""
    base = net.planes[0]
    widths = f", base_channels={base}" if base != 64 else ""
    widths += f", stem_channels={net.stem}" if net.stem != base else ""
    if (facts.res5_dilation or 1) > 1:
        widths += f", strides=(1, 2, 2, 1), dilations=(1, 1, 1, {facts.res5_dilation})"
    norms = "norm_cfg=dict(type='SyncBN'), norm_eval=False"
    if facts.norm == FROZEN:
        norms = "norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True"
    lines.append(
        f"backbone = dict(type='{'ResNeXt' if grouped else 'ResNet'}', depth={net.depth}{grouped}"
        f"{widths}, style='{'caffe' if facts.stride_in_1x1 else 'pytorch'}', {norms}, "
        "frozen_stages=-1)"
    )
    levels = numbered(tensors, r"fpn_lateral(\d+)\.weight")
    if not levels:
        return [*lines, "# not filled: neck and heads"]
    width = rows(tensors, f"fpn_lateral{levels[0]}.weight")
    extra = ", num_outs=5"
    if "top_block.p6.weight" in tensors:
        source = tensors["top_block.p6.weight"].shape[1]
        where = "on_output" if source == width else "on_input"
        extra += f", add_extra_convs='{where}', relu_before_extra_convs=True"
    norm = _mmdet_norm(tensors, f"fpn_lateral{levels[0]}")
    lines.append(
        f"neck = dict(type='FPN', in_channels={net.widths}, out_channels={width}, "
        f"start_level={levels[0] - 2}{extra}{norm})"
    )
    convs, fcs = box_layers(tensors)
    if convs or fcs:
        classes = rows(tensors, "roi_heads.box_predictor.cls_score.weight") - 1
        options = f", conv_out_channels={convs[0]}" if convs else ""
        options += f", num_classes={classes}" if classes > 0 else ""
        if rows(tensors, "roi_heads.box_predictor.bbox_pred.weight") == 4 != 4 * classes:
            options += ", reg_class_agnostic=True"
        lines.append(
            f"bbox_head = dict(type='ConvFCBBoxHead', num_shared_convs={len(convs)}, "
            f"num_shared_fcs={len(fcs) or 1}, fc_out_channels={(fcs or [FC_DIM])[0]}"
            f"{options}, in_channels={width}{_mmdet_norm(tensors, f'{BOX}.conv1')})  # of roi_head"
        )
    lines += _mmdet_mask(tensors, state)
    retina = any(name.startswith(("top_block.", "head.")) for name in tensors)
    if retina and (subnet := numbered(tensors, r"head\.cls_subnet\.(\d+)\.weight")):
        anchors = rows(tensors, "head.bbox_pred.weight") // 4 or 9
        predicted = rows(tensors, "head.cls_score.weight") // anchors
        lines.append(
            f"bbox_head = dict(type='RetinaHead', stacked_convs={len(subnet)}, in_channels={width}"
            + (f", num_classes={predicted}" if "bbox_head.retina_cls.weight" in state else "")
            + f", feat_channels={rows(tensors, f'head.cls_subnet.{subnet[0]}.weight')})"
        )
    parts = ["shared_fcs", "fc_cls", "fc_reg"] if convs or fcs else ["fc_cls", "fc_reg"]
    heads = ["rpn_head", *([] if convs or fcs else ["roi_head.bbox_head"])]
    heads += [f"roi_head.bbox_head.{part}" for part in parts]
    predicts = any(name.startswith("roi_head.bbox_head.fc_cls.") for name in state)
    if not predicts or any(name.startswith("roi_head.mask_head.") for name in state):
        heads += ["roi_head.mask_head"]  # not if a trained detector has none
    if retina:
        heads = [f"bbox_head.{part}" for part in ("cls_convs", "retina_cls", "retina_reg")]
    return lines + not_filled(heads, state)


def _mmdet_mask(tensors: Mapping[str, Tensor], state: Sequence[str]) -> list[str]:
    convs = numbered(tensors, rf"{re.escape(MASK)}\.mask_fcn(\d+)\.weight")
    if not convs or not any(name.startswith("roi_head.mask_head.") for name in state):
        return []
    first = tensors[f"{MASK}.mask_fcn{convs[0]}.weight"]
    options = f"in_channels={first.shape[1]}, conv_out_channels={len(first)}"
    masks = rows(tensors, f"{MASK}.predictor.weight")
    boxes = rows(tensors, "roi_heads.box_predictor.cls_score.weight") - 1
    if masks == 1 < boxes:
        options += f", num_classes={boxes}, class_agnostic=True"
    elif masks:
        options += f", num_classes={masks}"
    norm = _mmdet_norm(tensors, f"{MASK}.mask_fcn{convs[0]}")
    return [
        f"mask_head = dict(type='FCNMaskHead', num_convs={len(convs)}, {options}{norm})"
        "  # of roi_head"
    ]


def _mmdet_norm(tensors: Mapping[str, Tensor], layer: str) -> str:
    if f"{layer}.norm.weight" not in tensors:
        return ""
    batch = f"{layer}.norm.running_mean" in tensors
    return f", norm_cfg=dict(type={repr('SyncBN') if batch else repr('GN') + ', num_groups=32'})"


def detectron2_lines(
    tensors: Mapping[str, Tensor], facts: Facts, state: Sequence[str]
) -> list[str]:
    """Overrides of a LazyConfig, then of a yacs config."""
    lazy: dict[str, str] = {}
    yacs: dict[str, str] = {}
    comments: list[str] = []  # on the LazyConfig
    lines, res5 = unknown_pixels(facts), any(name.startswith("roi_heads.res5.") for name in state)
    if facts.input_format:
        if not is_fcos(tensors):  # which does not take it
            lazy["model.input_format"] = facts.input_format
        lazy["dataloader.train.mapper.image_format"] = facts.input_format
        yacs["INPUT.FORMAT"] = facts.input_format
    for key in ("pixel_mean", "pixel_std"):
        value = getattr(facts, key)
        if value is not None:
            text = "[" + ",".join(f"{v:g}" for v in value) + "]"
            lazy[f"model.{key}"] = yacs[f"MODEL.{key.upper()}"] = text
    pyramid = "fpn_lateral2.weight" in tensors or "fpn_lateral3.weight" in tensors
    if facts.timm is not None:
        lines.append("# the trunk is a TimmBackbone of region_pretrain.modeling.timm_backbone")
    elif trunk_kind(tensors) == "ResNet":
        net = ResNetLayout(tensors)
        trunk = "model.backbone.bottom_up" if pyramid else "model.backbone"
        norm = _detectron2_norm(tensors, "stem.conv1", facts.norm)
        if net.bottleneck and facts.stride_in_1x1 is not None:
            stride = str(facts.stride_in_1x1)
            lazy[f"{trunk}.stages.stride_in_1x1"] = yacs["MODEL.RESNETS.STRIDE_IN_1X1"] = stride
            if res5:
                lazy["model.roi_heads.res5.stride_in_1x1"] = stride
        lazy[f"{trunk}.stem.norm"] = lazy[f"{trunk}.stages.norm"] = norm
        if res5:
            lazy["model.roi_heads.res5.norm"] = norm
        yacs["MODEL.RESNETS.NORM"] = norm
        if net.depth:
            lazy[f"{trunk}.stages.depth"] = yacs["MODEL.RESNETS.DEPTH"] = str(net.depth)
        yacs["MODEL.RESNETS.RES2_OUT_CHANNELS"] = str(net.widths[0])
        yacs["MODEL.RESNETS.STEM_OUT_CHANNELS"] = str(net.stem)
        if net.groups > 1:
            yacs["MODEL.RESNETS.NUM_GROUPS"] = str(net.groups)
            yacs["MODEL.RESNETS.WIDTH_PER_GROUP"] = str(net.group_width)
        if (facts.res5_dilation or 1) > 1:
            yacs["MODEL.RESNETS.RES5_DILATION"] = str(facts.res5_dilation)
            dilated = f"# and make {'roi_heads.res5' if res5 else 'res5'} with first_stride=1 and "
            comments.append(f"{dilated}dilation={facts.res5_dilation} (DC5)")
    if pyramid:
        level = numbered(tensors, r"fpn_lateral(\d+)\.weight")[0]
        width = str(rows(tensors, f"fpn_lateral{level}.weight"))
        lazy["model.backbone.out_channels"] = yacs["MODEL.FPN.OUT_CHANNELS"] = width
        norm = _detectron2_norm(tensors, f"fpn_lateral{level}", facts.fpn_norm)
        lazy["model.backbone.norm"] = yacs["MODEL.FPN.NORM"] = norm
    _detectron2_box(tensors, facts, lazy, yacs)
    if pyramid and width != "256":
        _lazy_inputs(tensors, width, lazy, comments)
    lines += ["# LazyConfig", *(f"{key}={value}" for key, value in lazy.items()), *comments]
    if facts.timm is None and "res2.0.conv1.weight" in tensors and not is_bottleneck(tensors):
        lines.append("# and delete stages.stride_in_1x1, which basic blocks do not accept")
    return [*lines, "# yacs", *(f"{key} {value}" for key, value in yacs.items())]


def _detectron2_box(
    tensors: Mapping[str, Tensor], facts: Facts, lazy: dict[str, str], yacs: dict[str, str]
) -> None:
    convs, fcs = box_layers(tensors)
    if not convs and not fcs:
        return
    norm = _detectron2_norm(tensors, f"{BOX}.conv1", facts.box_norm)
    lazy["model.roi_heads.box_head.conv_dims"] = str(convs).replace(" ", "")
    if fcs:
        lazy["model.roi_heads.box_head.fc_dims"] = str(fcs).replace(" ", "")
        lazy["model.roi_heads.box_predictor.input_shape.channels"] = str(fcs[-1])
    lazy["model.roi_heads.box_head.conv_norm"] = yacs["MODEL.ROI_BOX_HEAD.NORM"] = norm
    yacs["MODEL.ROI_BOX_HEAD.NAME"] = "FastRCNNConvFCHead"
    yacs["MODEL.ROI_BOX_HEAD.NUM_CONV"] = str(len(convs))
    if fcs:
        yacs["MODEL.ROI_BOX_HEAD.NUM_FC"] = str(len(fcs))
        yacs["MODEL.ROI_BOX_HEAD.FC_DIM"] = str(fcs[0])
    if convs:
        yacs["MODEL.ROI_BOX_HEAD.CONV_DIM"] = str(convs[0])


def _lazy_inputs(
    tensors: Mapping[str, Tensor], width: str, lazy: dict[str, str], comments: list[str]
) -> None:
    """The heads' input channels, which do not follow the backbone's in the zoo's LazyConfigs."""
    if f"{BOX}.conv1.weight" not in tensors and f"{BOX}.fc1.weight" not in tensors:
        comments.append(f"# and give the heads {width} input channels")
        return
    masks = "model.roi_heads.mask_head.input_shape.channels"
    lazy["model.proposal_generator.head.in_channels"] = width
    lazy["model.roi_heads.box_head.input_shape.channels"] = width
    if any(name.startswith(f"{MASK}.") for name in tensors):
        lazy[masks] = width
    else:
        comments.append(f"# and {masks}={width} if it has masks")


def _detectron2_norm(tensors: Mapping[str, Tensor], layer: str, known: str | None) -> str:
    if f"{layer}.norm.weight" not in tensors:
        return '""'
    if f"{layer}.norm.running_mean" not in tensors:
        return "GN"
    return _NORMS.get(known or "", "BN")


def lines_for(
    to: str,
    tensors: Mapping[str, Tensor],
    facts: Facts,
    state: Sequence[str],
    whole: Mapping[str, Tensor],
) -> list[str]:
    """The lines for torchvision, timm or mmdetection.

    Args:
        to: the target.
        tensors: common name -> exported tensor.
        facts: what the weights presume.
        state: the target's names that are filled.
        whole: common name -> tensor of the file, also those that are not exported.
    """
    if to == "torchvision":
        lines = torchvision_lines(tensors, facts, state, whole)
    else:
        lines = {"timm": timm_lines, "mmdet": _mmdet}[to](tensors, facts, state)
    return sorted(lines, key=lambda line: not line.startswith(("import ", "from ")))
