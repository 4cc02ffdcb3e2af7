"""What weights presume of their network besides its shapes: input format, mean, std and strides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BottleneckBlock, CNNBlockBase
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import nn

from region_pretrain.modeling.preprocess import Preprocess, format_of_mean
from region_pretrain.modeling.timm_backbone import TimmBackbone

_RGB_MEAN, _RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
#: The class of norms that are fixed affine layers.
FROZEN = "FrozenBatchNorm2d"


@dataclass(frozen=True)
class Facts:
    """What is known of a network; None where it is not.

    Attributes:
        input_format: ``"RGB"`` or ``"BGR"``.
        pixel_mean, pixel_std: per channel in the order of ``input_format``, for pixels in [0, 255].
        stride_in_1x1: whether a ResNet's bottlenecks have their stride in the first 1x1
            convolution instead of the 3x3 one.
        norm, fpn_norm, box_norm: class of the norms of a ResNet, of its FPN and of the box head's
            convolutions, e.g. ``"SyncBatchNorm"``; only for information.
        timm: arguments of ``timm.create_model`` for the trunk if it is timm's.
        res5_dilation: of a ResNet's last stage; above 1 it has the stride of the one before (DC5).
    """

    input_format: str | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    stride_in_1x1: bool | None = None
    norm: str | None = None
    timm: dict[str, Any] | None = None
    res5_dilation: int | None = None
    fpn_norm: str | None = None
    box_norm: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Facts:
        """The facts of a checkpoint; unknown entries are ignored."""
        known = {field.name for field in fields(cls)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known}
        return cls(**values)


#: Networks of torchvision, and releases that train them.
IMAGENET = Facts("RGB", _RGB_MEAN, _RGB_STD, stride_in_1x1=False)
#: The Caffe2 files of Detectron2's model zoo: MSRA's ResNets.
MSRA = Facts("BGR", _RGB_MEAN[::-1], (1.0, 1.0, 1.0), stride_in_1x1=True)
#: FAIR's ResNets with group norm, and their ResNeXts, in the same format.
FAIR_GN = Facts("BGR", _RGB_MEAN[::-1], (1.0, 1.0, 1.0), stride_in_1x1=False)
FAIR_RESNEXT = Facts("BGR", _RGB_MEAN[::-1], _RGB_STD[::-1], stride_in_1x1=False)


def facts_of(model: nn.Module) -> Facts:
    """The facts of a detector or a pre-training model."""
    owners = [m for m in model.modules() if hasattr(m, "pixel_mean")]
    source: Any = next((m for m in owners if isinstance(m, Preprocess)), (owners or [model])[0])
    if isinstance(source, Preprocess):
        input_format = "BGR" if source.flip_channels else "RGB"
    else:
        input_format = getattr(source, "input_format", None)
    mean, std = (_values(getattr(source, key, None)) for key in ("pixel_mean", "pixel_std"))
    if input_format is None and mean is not None:
        input_format = format_of_mean(mean)
    blocks = [m for m in model.modules() if isinstance(m, BottleneckBlock)]
    strided = next((b for b in blocks if (2, 2) in (b.conv1.stride, b.conv2.stride)), None)
    trunk, fpn, box_head = (
        next((m for m in model.modules() if isinstance(m, kind)), None)
        for kind in (CNNBlockBase, FPN, FastRCNNConvFCHead)
    )
    of_timm = next((m for m in model.modules() if isinstance(m, TimmBackbone)), None)
    return Facts(
        input_format,
        mean,
        std,
        (None if of_timm is None else False) if strided is None else strided.conv1.stride == (2, 2),
        _norm_of(trunk),
        None if of_timm is None else of_timm.arguments,
        max((b.conv2.dilation[0] for b in blocks), default=None),
        _norm_of(fpn),
        _norm_of(box_head),
    )


def _norm_of(module: nn.Module | None) -> str | None:
    """The class of the norms in a module's convolutions, without those of a bottom-up trunk."""
    norms = (
        type(part.norm).__name__
        for name, part in (() if module is None else module.named_modules())
        if not name.startswith("bottom_up.") and isinstance(getattr(part, "norm", None), nn.Module)
    )
    return next(norms, None)


def _values(tensor: torch.Tensor | None) -> tuple[float, ...] | None:
    if tensor is None or tensor.is_meta:
        return None
    return tuple(round(value, 4) for value in tensor.flatten().tolist())


def differences(theirs: Facts, ours: Facts) -> tuple[list[str], list[str]]:
    """Compare the facts of weights with those of the model that is to be filled.

    Returns:
        (faults, cautions). Faults make the weights wrong for the model: the place of the strides.
        Cautions are pixels that the weights have not seen; each names the overrides that agree with
        the weights, in LazyConfig's and in yacs's keys.
    """
    faults, cautions = [], []
    if None not in (theirs.stride_in_1x1, ours.stride_in_1x1) and (
        theirs.stride_in_1x1 != ours.stride_in_1x1
    ):
        faults.append(
            f"its bottlenecks have the stride in the {'1x1' if theirs.stride_in_1x1 else '3x3'} "
            f"convolution, the detector's in the {'1x1' if ours.stride_in_1x1 else '3x3'} one: set "
            f"stride_in_1x1={theirs.stride_in_1x1} in the backbone's stages (yacs: "
            f"MODEL.RESNETS.STRIDE_IN_1X1 {theirs.stride_in_1x1})"
        )
    values = {key: getattr(theirs, key) for key in ("pixel_mean", "pixel_std")}
    texts = {
        key: "[" + ",".join(f"{v:g}" for v in value) + "]" for key, value in values.items() if value
    }
    order = theirs.input_format
    if None not in (order, ours.input_format) and order != ours.input_format:
        lazy = [f"model.input_format={order}", *(f"model.{k}={v}" for k, v in texts.items())]
        yacs = [f"INPUT.FORMAT={order}", *(f"MODEL.{k.upper()}={v}" for k, v in texts.items())]
        cautions.append(
            f"it was trained on {order} images, the detector reads {ours.input_format}: set "
            f"{' '.join(lazy)} and, in fine-tuning, dataloader.train.mapper.image_format={order} "
            f"(yacs: {' '.join(yacs)})"
        )
        return faults, cautions
    for key, value in values.items():
        mine = getattr(ours, key)
        if None in (value, mine) or _close(value, mine):
            continue
        cautions.append(
            f"it was trained with {key} {texts[key]} ({order}), the detector has {[*mine]} "
            f"({ours.input_format}): set model.{key}={texts[key]} (yacs: "
            f"MODEL.{key.upper()}={texts[key]})"
        )
    return faults, cautions


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    if len(a) != len(b):
        return False
    return all(abs(x - y) <= 0.02 * abs(y) + 1e-3 for x, y in zip(a, b, strict=True))
