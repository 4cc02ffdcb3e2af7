"""Layers of heads whose channels libraries order differently: background, RetinaNet's anchors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from region_pretrain.convert.layout import rows

#: Bias of a class that RetinaNet must never predict; the weights are 0.
_NEVER = -10.0


def predicted(tensors: Mapping[str, Tensor]) -> int:
    """The number of classes of a detector's predictors, without the background; 0 if unknown."""
    if boxes := rows(tensors, "roi_heads.box_predictor.cls_score.weight"):
        return boxes - 1
    if dense := rows(tensors, "head.cls_score.weight"):
        return dense // (_anchors(tensors) or 9)
    return rows(tensors, "roi_heads.mask_head.predictor.weight")


def swap_anchor_axes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reorder RetinaNet's 3x3 anchors between (size, ratio) and (ratio, size); its own inverse.

    Detectron2 lists the ratios of each size, torchvision and mmdetection the sizes of each ratio.
    Nine anchors are taken for three sizes and three ratios, a prime number for one size or ratio.
    """
    if _anchors(tensors) != 9:
        return dict(tensors)
    return {
        name: (
            tensor.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)
            if name.startswith(("head.cls_score.", "head.bbox_pred."))
            else tensor
        )
        for name, tensor in tensors.items()
    }


def background_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move or add the background as torchvision's class 0.

    Detectron2 has no boxes and masks of the background; those added are zeros.
    """
    anchors = _anchors(tensors)
    moved = {}
    for name, tensor in tensors.items():
        if name.startswith("roi_heads.box_predictor.cls_score."):
            tensor = tensor.roll(1, 0)
        elif name.startswith("roi_heads.box_predictor.bbox_pred."):
            tensor = torch.cat([torch.zeros_like(tensor[:4]), tensor])
        elif name.startswith("roi_heads.mask_head.predictor."):
            tensor = torch.cat([torch.zeros_like(tensor[:1]), tensor])
        elif name.startswith("head.cls_score."):
            classes = tensor.unflatten(0, (anchors, -1))
            value = _NEVER if name.endswith("bias") else 0.0
            added = torch.full_like(classes[:, :1], value)
            tensor = torch.cat([added, classes], 1).flatten(0, 1)
        moved[name] = tensor
    return moved


def background_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`background_first`."""
    anchors = _anchors(tensors)
    moved = {}
    for name, tensor in tensors.items():
        if name.startswith("roi_heads.box_predictor.cls_score."):
            tensor = tensor.roll(-1, 0)
        elif name.startswith("roi_heads.box_predictor.bbox_pred."):
            tensor = tensor[4:]
        elif name.startswith("roi_heads.mask_head.predictor."):
            tensor = tensor[1:]
        elif name.startswith("head.cls_score."):
            tensor = tensor.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1)
        moved[name] = tensor
    return moved


def missing_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the convolutions of RetinaNet's towers, which have biases in Detectron2 only."""
    added = {}
    for name, tensor in tensors.items():
        bias = name.removesuffix("weight") + "bias"
        if "_subnet." in name and tensor.ndim == 4 and bias not in tensors:
            added[bias] = tensor.new_zeros(len(tensor))
    return added


def _anchors(tensors: Mapping[str, Tensor]) -> int:
    """RetinaNet's anchors per position."""
    weight = tensors.get("head.bbox_pred.weight")
    return 0 if weight is None else weight.shape[0] // 4
