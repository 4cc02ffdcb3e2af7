"""The tensors' names in other libraries and releases, translated to Detectron2's.

The common form of a name is Detectron2's without the detector's layout: ``res3.0.conv1.weight`` in
the trunk of any detector, ``fpn_lateral2.weight`` in its FPN, ``roi_heads.box_head.fc1.weight`` in
its heads. :func:`common_name` converts a name of Detectron2, so weights move between detectors with
an FPN, C4 and DC5 detectors and bare trunks. timm's ResNet, Swin and ViT have the common names of
Detectron2's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from region_pretrain.convert.trunk_names import (
    ANY,
    CONVNEXT,
    CONVNEXT_FACEBOOK,
    CONVNEXT_TORCHVISION,
    RESNET,
    SWIN,
    SWIN_TIMM,
    SWIN_TORCHVISION,
    TIMM,
    VIT,
    VIT_TORCHVISION,
    Rule,
    translate,
)


def common_name(name: str) -> str:
    """The common form of a name in a Detectron2 detector or trunk."""
    own = timm_name(name)
    if own is not None:
        return translate(TIMM, own) or own
    name = re.sub(r"^roi_heads\.res5\.(?=\d)", "res5.", name)
    return re.sub(r"^backbone\.(bottom_up\.|net\.)?", "", name)


def timm_name(name: str) -> str | None:
    """timm's name of a tensor in a :class:`~region_pretrain.modeling.timm_backbone.TimmBackbone`.

    Args:
        name: name in a detector, or in the backbone. For those of other modules None is returned.
    """
    match = re.match(r"(?:backbone\.(?:bottom_up\.|net\.)?)?timm\.", name)
    return name[match.end() :] if match else None


def under(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules for names with a prefix."""
    return tuple((re.escape(prefix) + pattern, form) for pattern, form in rules)


# A level is counted from the first one until `with_levels` adds the number of that.
_MM_NECK: tuple[Rule, ...] = (
    (r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"fpn_lateral<\1>.\2"),
    (rf"neck\.lateral_convs\.(\d)\.(?:bn|gn)\.{ANY}", r"fpn_lateral<\1>.norm.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(weight|bias)", r"fpn_output<\1>.\2"),
    (rf"neck\.fpn_convs\.(\d)\.(?:bn|gn)\.{ANY}", r"fpn_output<\1>.norm.\2"),
)

_RPN = "proposal_generator.rpn_head"
_BOX = "roi_heads.box_head"
_MASK = "roi_heads.mask_head"

TORCHVISION_DETECTOR: tuple[Rule, ...] = (
    *under("backbone.body.", RESNET),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"fpn_lateral<\1>.\2"),
    (rf"backbone\.fpn\.inner_blocks\.(\d)\.1\.{ANY}", r"fpn_lateral<\1>.norm.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"fpn_output<\1>.\2"),
    (rf"backbone\.fpn\.layer_blocks\.(\d)\.1\.{ANY}", r"fpn_output<\1>.norm.\2"),
    (r"backbone\.fpn\.extra_blocks\.(p[67])\.(weight|bias)", r"top_block.\1.\2"),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", rf"{_RPN}.conv.\1"),
    (r"rpn\.head\.conv\.([1-9])\.0\.(weight|bias)", rf"{_RPN}.conv.conv\1.\2"),
    (r"rpn\.head\.cls_logits\.(weight|bias)", rf"{_RPN}.objectness_logits.\1"),
    (r"rpn\.head\.bbox_pred\.(weight|bias)", rf"{_RPN}.anchor_deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(weight|bias)", rf"{_BOX}.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(weight|bias)", rf"{_BOX}.fc2.\1"),
    (r"roi_heads\.box_head\.(\d)\.0\.(weight|bias)", lambda m: f"{_BOX}.conv{_next(m)}.{m[2]}"),
    (rf"roi_heads\.box_head\.(\d)\.1\.{ANY}", lambda m: f"{_BOX}.conv{_next(m)}.norm.{m[2]}"),
    (r"roi_heads\.box_head\.\d\.(weight|bias)", rf"{_BOX}.fc1.\1"),
    (r"(roi_heads\.box_predictor\.(?:cls_score|bbox_pred)\.(?:weight|bias))", r"\1"),
    (
        r"roi_heads\.mask_head\.(\d)\.0\.(weight|bias)",
        lambda m: f"{_MASK}.mask_fcn{_next(m)}.{m[2]}",
    ),
    (
        rf"roi_heads\.mask_head\.(\d)\.1\.{ANY}",
        lambda m: f"{_MASK}.mask_fcn{_next(m)}.norm.{m[2]}",
    ),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)", rf"{_MASK}.mask_fcn\1.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(weight|bias)", rf"{_MASK}.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(weight|bias)", rf"{_MASK}.predictor.\1"),
    (
        r"head\.classification_head\.conv\.(\d)\.0\.(weight|bias)",
        lambda m: f"head.cls_subnet.{2 * int(m[1])}.{m[2]}",
    ),
    (r"head\.classification_head\.conv\.(\d)\.1\.(weight|bias)", r"head.cls_subnet<\1>.\2"),
    (r"head\.regression_head\.conv\.(\d)\.1\.(weight|bias)", r"head.bbox_subnet<\1>.\2"),
    (
        r"head\.regression_head\.conv\.(\d)\.0\.(weight|bias)",
        lambda m: f"head.bbox_subnet.{2 * int(m[1])}.{m[2]}",
    ),
    (r"head\.classification_head\.cls_logits\.(weight|bias)", r"head.cls_score.\1"),
    (r"head\.regression_head\.bbox_reg\.(weight|bias)", r"head.bbox_pred.\1"),
)

MMDETECTION: tuple[Rule, ...] = (
    *under("backbone.", RESNET),
    *_MM_NECK,
    (r"rpn_head\.rpn_conv\.(weight|bias)", rf"{_RPN}.conv.\1"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", rf"{_RPN}.objectness_logits.\1"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", rf"{_RPN}.anchor_deltas.\1"),
    (
        r"roi_head\.bbox_head\.shared_convs\.(\d)\.conv\.(weight|bias)",
        lambda m: f"{_BOX}.conv{_next(m)}.{m[2]}",
    ),
    (
        rf"roi_head\.bbox_head\.shared_convs\.(\d)\.(?:bn|gn)\.{ANY}",
        lambda m: f"{_BOX}.conv{_next(m)}.norm.{m[2]}",
    ),
    (
        r"roi_head\.bbox_head\.shared_fcs\.(\d)\.(weight|bias)",
        lambda m: f"{_BOX}.fc{_next(m)}.{m[2]}",
    ),
    (r"roi_head\.bbox_head\.fc_cls\.(weight|bias)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(weight|bias)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (
        r"roi_head\.mask_head\.convs\.(\d)\.conv\.(weight|bias)",
        lambda m: f"{_MASK}.mask_fcn{_next(m)}.{m[2]}",
    ),
    (
        rf"roi_head\.mask_head\.convs\.(\d)\.(?:bn|gn)\.{ANY}",
        lambda m: f"{_MASK}.mask_fcn{_next(m)}.norm.{m[2]}",
    ),
    (r"roi_head\.mask_head\.upsample\.(weight|bias)", rf"{_MASK}.deconv.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(weight|bias)", rf"{_MASK}.predictor.\1"),
    (
        r"bbox_head\.cls_convs\.(\d)\.conv\.(weight|bias)",
        lambda m: f"head.cls_subnet.{2 * int(m[1])}.{m[2]}",
    ),
    (
        r"bbox_head\.reg_convs\.(\d)\.conv\.(weight|bias)",
        lambda m: f"head.bbox_subnet.{2 * int(m[1])}.{m[2]}",
    ),
    (r"bbox_head\.retina_cls\.(weight|bias)", r"head.cls_score.\1"),
    (r"bbox_head\.retina_reg\.(weight|bias)", r"head.bbox_pred.\1"),
)

#: Releases that name a detector's parts encoder, neck and head.
ENCODER_NECK_HEAD: tuple[Rule, ...] = (
    *under("encoder.", RESNET),
    *_MM_NECK,
    (r"head\.conv(\d)\.(weight|bias)", rf"{_BOX}.conv\1.\2"),
    (rf"head\.bn(\d)\.{ANY}", rf"{_BOX}.conv\1.norm.\2"),
    (r"head\.fc(\d)\.(weight|bias)", rf"{_BOX}.fc\1.\2"),
)


def _next(match: re.Match) -> int:
    return int(match[1]) + 1


class Scheme(NamedTuple):
    """How a library or release names its tensors.

    Attributes:
        library: ``?as=`` selects the schemes of a library.
        title: what the log calls it.
        anchor: pattern of the name of a tensor that every such file has; what precedes it in the
            file is the prefix of all names.
        others: patterns, each of which must match a name after the prefix.
        rules: translation of the names after the prefix.
        imagenet: whether the network was trained on RGB images normalised with ImageNet's mean and
            standard deviation, with ResNet's stride in the 3x3 convolution.
    """

    library: str
    title: str
    anchor: str
    rules: tuple[Rule, ...]
    others: tuple[str, ...] = ()
    imagenet: bool = False


#: The first scheme that fits is taken.
SCHEMES = (
    Scheme(
        "torchvision",
        "a torchvision detector",
        r"backbone\.body\.layer1\.0\.conv1\.weight",
        TORCHVISION_DETECTOR,
        imagenet=True,
    ),
    Scheme(
        "mmdet",
        "an mmdetection detector",
        r"backbone\.layer1\.0\.conv1\.weight",
        MMDETECTION,
        others=(r"neck\.(lateral_convs|fpn_convs)\..*",),
    ),
    Scheme(
        "release",
        "a release with encoder, neck and head",
        r"encoder\.layer1\.0\.conv1\.weight",
        ENCODER_NECK_HEAD,
        others=(r"neck\.lateral_convs\..*",),
        imagenet=True,
    ),
    Scheme(
        "torchvision", "a ResNet", r"layer1\.0\.conv1\.weight", RESNET, (r"conv1\.weight",), True
    ),
    Scheme(
        "torchvision", "torchvision's Swin", r"features\.1\.0\.attn\.qkv\.weight", SWIN_TORCHVISION
    ),
    Scheme(
        "timm",
        "timm's Swin",
        r"layers\.0\.blocks\.0\.attn\.qkv\.weight",
        SWIN_TIMM,
        others=(r"layers\.3\.downsample\..*",),
    ),
    Scheme("swin", "a Swin", r"layers\.0\.blocks\.0\.attn\.qkv\.weight", SWIN),
    Scheme(
        "torchvision",
        "torchvision's ViT",
        r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight",
        VIT_TORCHVISION,
    ),
    Scheme(
        "timm",
        "a ViT",
        r"blocks\.0\.attn\.qkv\.weight",
        VIT,
        others=(r"patch_embed\.proj\.weight",),
    ),
    Scheme(
        "torchvision",
        "torchvision's ConvNeXt",
        r"features\.1\.0\.block\.0\.weight",
        CONVNEXT_TORCHVISION,
    ),
    Scheme(
        "facebook",
        "Facebook's ConvNeXt",
        r"downsample_layers\.0\.0\.weight",
        CONVNEXT_FACEBOOK,
        others=(r"stages\.0\.0\.dwconv\.weight",),
    ),
    Scheme("timm", "timm's ConvNeXt", r"stages\.0\.blocks\.0\.conv_dw\.weight", CONVNEXT),
)


def with_levels(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Number FPN levels that are counted from 0, ``fpn_lateral<0>``, as Detectron2 does.

    The first lateral convolution tells its level by its input channels, those of a trunk's stage.
    Outputs without a lateral convolution are the extra levels of RetinaNet. An RPN's convolution is
    numbered if it has several. The towers of a RetinaNet with norms have three layers per
    convolution instead of two.
    """
    if "head.cls_subnet<0>.weight" in weights:
        layer = re.compile(r"(?<=_subnet)(?:\.(?P<convolution>\d+)|<(?P<norm>\d)>)")
        renamed = (layer.sub(_tower_layer, name) for name in weights)
        weights = dict(zip(renamed, weights.values(), strict=True))
    if f"{_RPN}.conv.conv1.weight" in weights:
        first = re.compile(rf"({_RPN}\.conv)(?=\.(weight|bias)$)")
        renamed = (first.sub(r"\1.conv0", name) for name in weights)
        weights = dict(zip(renamed, weights.values(), strict=True))
    lateral = weights.get("fpn_lateral<0>.weight")
    if lateral is None:
        return dict(weights)
    laterals = sum(bool(re.fullmatch(r"fpn_lateral<\d>\.weight", name)) for name in weights)
    widths = _stage_widths(weights)
    first = next((level for level, width in widths.items() if width == lateral.shape[1]), 2)

    def numbered(match: re.Match) -> str:
        place = int(match[2])
        if match[1] == "fpn_output" and place >= laterals:
            return f"top_block.p{first + place}"
        return f"{match[1]}{first + place}"

    return {re.sub(r"^(fpn_\w+)<(\d)>", numbered, name): w for name, w in weights.items()}


def _tower_layer(match: re.Match) -> str:
    if match["norm"]:
        return f".{3 * int(match['norm']) + 1}"
    return f".{3 * int(match['convolution']) // 2}"


def _stage_widths(weights: Mapping[str, Tensor]) -> dict[int, int]:
    """Level -> channels of the trunk's stage, 2 to 5."""
    widths = {}
    for name, weight in weights.items():
        match = re.fullmatch(r"res(\d)\.\d+\.conv\d\.weight", name)
        if match:
            widths[int(match[1])] = weight.shape[0]  # the last convolution of the stage
    return widths
