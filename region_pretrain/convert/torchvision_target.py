"""The Python that builds a torchvision network around exported weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from region_pretrain.convert.facts import FROZEN, Facts
from region_pretrain.convert.heads import predicted
from region_pretrain.convert.layout import (
    BOX,
    FC_DIM,
    MASK,
    RPN,
    ResNetLayout,
    box_layers,
    is_fcos,
    numbered,
    rows,
)
from region_pretrain.convert.lines import not_filled, pixel_lines, stride_lines, unknown_pixels


def torchvision_lines(
    tensors: Mapping[str, Tensor],
    facts: Facts,
    state: Sequence[str],
    whole: Mapping[str, Tensor],
) -> list[str]:
    """Python that builds the network; see :func:`~region_pretrain.convert.targets.lines_for`."""
    net = ResNetLayout(tensors)
    lines = ["from torch import nn", f"from torchvision.models.resnet import {net.block}, ResNet"]
    lines += [*pixel_lines(facts), *stride_lines(facts, net)]
    if net.planes != [64, 128, 256, 512] or net.stem != 64:
        lines.append(
            f"# torchvision's ResNet has no widths {net.planes} and stem {net.stem}: build your own"
        )
    options = f", groups={net.groups}, width_per_group={net.group_width}"
    options = options if (net.groups, net.group_width) != (1, 64) else ""
    options += "" if net.batch_norm else _norm_layer(tensors, "stem.conv1")
    if facts.norm == FROZEN:
        lines.append("from torchvision.ops import FrozenBatchNorm2d")
        options += ", norm_layer=FrozenBatchNorm2d"
    levels = numbered(tensors, r"fpn_lateral(\d+)\.weight")
    trunk = "trunk" if levels else "model"
    lines += [f"{trunk} = ResNet({net.block}, {net.blocks}{options})"]
    if not levels:
        normalize = [] if unknown_pixels(facts) else ["normalize = Normalize(mean, std)"]
        lines[:0] = ["from torchvision.transforms import Normalize"] if normalize else []
        return [*lines, "model.fc = nn.Identity()  # no classifier in the file", *normalize]
    return lines + _detector(tensors, facts, state, levels, whole)


def _detector(
    tensors: Mapping[str, Tensor],
    facts: Facts,
    state: Sequence[str],
    levels: list[int],
    whole: Mapping[str, Tensor],
) -> list[str]:
    width = rows(tensors, f"fpn_lateral{levels[0]}.weight")
    inputs = [tensors[f"fpn_lateral{level}.weight"].shape[1] for level in levels]
    returned = {f"layer{level - 1}": str(i) for i, level in enumerate(levels)}
    retina = any(name.startswith(("top_block.", "head.")) for name in tensors)
    extra = ""
    if "top_block.p6.weight" in tensors:
        extra = f", extra_blocks=LastLevelP6P7({tensors['top_block.p6.weight'].shape[1]}, {width})"
    lines = [
        "from torchvision.models.detection.backbone_utils import BackboneWithFPN",
        f"backbone = BackboneWithFPN(trunk, {returned}, {inputs}, {width}{extra}"
        f"{_norm_layer(tensors, f'fpn_lateral{levels[0]}')})",
    ]
    pixels = "" if unknown_pixels(facts) else ", image_mean=mean, image_std=std"
    if retina:
        heads = [f"head.classification_head.{part}" for part in ("conv", "cls_logits")]
        heads += [f"head.regression_head.{part}" for part in ("conv", "bbox_reg")]
        if extra:
            lines[:0] = ["from torchvision.ops.feature_pyramid_network import LastLevelP6P7"]
        if is_fcos(whole):
            lines[:0] = ["from torchvision.models.detection.fcos import FCOS"]
            lines += [
                f"{_num_classes(whole)}, which has no boxes",
                f"model = FCOS(backbone, num_classes{pixels})",
            ]
            return lines + not_filled([*heads, "head.regression_head.bbox_ctrness"], state)
        lines[:0] = ["from torchvision.models.detection.anchor_utils import AnchorGenerator"]
        lines[:0] = ["from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead"]
        anchors = rows(tensors, "head.bbox_pred.weight") // 4 or 9
        lines += [
            f"{_num_classes(whole)}, which has no boxes",
            f"model = RetinaNet(backbone, num_classes, head=RetinaNetHead({width}, {anchors}, "
            f"num_classes){pixels})",
        ]
        depth = len(numbered(tensors, r"head\.cls_subnet\.(\d+)\.weight"))
        if depth not in (0, 4):  # torchvision's have four convolutions
            lines[:0] = ["from copy import deepcopy"]
            layers = f"deepcopy(tower.conv[0]) for _ in range({depth})"
            lines += [
                "for tower in model.head.children():",
                f"    tower.conv = nn.Sequential(*({layers}))",
            ]
        return lines + not_filled(heads, state)
    mask = _mask(tensors)
    name = "MaskRCNN" if mask else "FasterRCNN"
    module = "mask_rcnn" if mask else "faster_rcnn"
    rpn_width = rows(tensors, f"{RPN}.objectness_logits.weight")
    depth = len(numbered(tensors, rf"{re.escape(RPN)}\.conv\.conv(\d+)\.weight")) or 1
    box, features, parts = _box(tensors, width)
    arguments = ["backbone", f"rpn_head=RPNHead({width}, {rpn_width}, {depth})"]
    arguments = arguments if rpn_width else arguments[:1]
    arguments += [
        f"box_head={box}",
        f"box_predictor=FastRCNNPredictor({features}, num_classes)",
        *mask,
    ]
    lines[:0] = [
        f"from torchvision.models.detection import {module}",
        "from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, "
        "FastRCNNPredictor, TwoMLPHead",
        "from torchvision.models.detection.rpn import RPNHead",
    ]
    lines += [
        _num_classes(whole),
        f"model = {module}.{name}({', '.join(arguments)}{pixels})",
        "# set the detector's anchor sizes, which are not in the file",
        "# torchvision pools regions without the half-pixel shift of Detectron2's ROIAlignV2",
    ]
    heads = ["rpn.head", *parts, "roi_heads.box_predictor"]
    heads += ["roi_heads.mask_head", "roi_heads.mask_predictor"] if mask else []
    return lines + not_filled(heads, state)


def _num_classes(whole: Mapping[str, Tensor]) -> str:
    if classes := predicted(whole):
        return f"num_classes = {classes + 1}  # class 0 is the background"
    return (
        "num_classes = 91  # of COCO: set your number of classes plus 1; class 0 is the background"
    )


def _box(tensors: Mapping[str, Tensor], width: int) -> tuple[str, int, list[str]]:
    """The constructor of the box head, its output width, and the names of its parts."""
    convs, fcs = box_layers(tensors)
    if not convs and not fcs:
        return f"TwoMLPHead({width} * 7 * 7, {FC_DIM})", FC_DIM, ["roi_heads.box_head"]
    if not convs and len(fcs) == 2:
        inputs = tensors[f"{BOX}.fc1.weight"].shape[1]
        return f"TwoMLPHead({inputs}, {fcs[-1]})", fcs[-1], ["roi_heads.box_head"]
    norm = _norm_layer(tensors, f"{BOX}.conv1")
    fc = f"roi_heads.box_head.{len(convs) + 1}"  # of a Sequential, after the flattening
    fcs = fcs or [FC_DIM]
    return f"FastRCNNConvFCHead(({width}, 7, 7), {convs}, {fcs}{norm})", fcs[-1], [fc]


def _mask(tensors: Mapping[str, Tensor]) -> list[str]:
    convs = numbered(tensors, rf"{re.escape(MASK)}\.mask_fcn(\d+)\.weight")
    if not convs:
        return []
    channels = [rows(tensors, f"{MASK}.mask_fcn{i}.weight") for i in convs]
    inputs = tensors[f"{MASK}.mask_fcn1.weight"].shape[1]
    norm = _norm_layer(tensors, f"{MASK}.mask_fcn1")
    deconv = tensors.get(f"{MASK}.deconv.weight")
    inner = channels[-1] if deconv is None else deconv.shape[1]
    return [
        f"mask_head=mask_rcnn.MaskRCNNHeads({inputs}, {channels}, 1{norm})",
        f"mask_predictor=mask_rcnn.MaskRCNNPredictor({channels[-1]}, {inner}, num_classes)",
    ]


def _norm_layer(tensors: Mapping[str, Tensor], layer: str) -> str:
    """The ``norm_layer`` argument of torchvision for a layer's norm, with a leading comma."""
    if f"{layer}.norm.weight" not in tensors:
        return ""
    if f"{layer}.norm.running_mean" in tensors:
        return ", norm_layer=nn.BatchNorm2d"
    return ", norm_layer=lambda channels: nn.GroupNorm(32, channels)"
