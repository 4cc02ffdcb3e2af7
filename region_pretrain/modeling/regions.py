"""Region features: boxes to pyramid levels, and the detector's own pooler on those levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor

UNASSIGNED = -1


def assign_levels(boxes: Tensor, max_scales: Sequence[float]) -> Tensor:
    """Scale-aware level assignment.

    A box of scale ``s = sqrt(w h)`` goes to the first level whose bound is not below ``s``. Unlike
    Detectron2's canonical rule (224 pixels to P4) the bounds are in the view's own pixels, so one
    object lands on different levels in views of different resolution.

    Args:
        boxes: ``(..., 4)`` XYXY in view pixels, half-open.
        max_scales: largest scale of each level in pixels, increasing, e.g. (48, 96, 192, 224).

    Returns:
        ``(...)`` int64 level indices; :data:`UNASSIGNED` above the last bound.
    """
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    scale = (width * height).sqrt()
    level = torch.zeros_like(scale, dtype=torch.int64)
    for bound in max_scales:
        # The tolerance keeps a whole-view box on its level when its sides carry rounding error.
        level += scale > bound * (1 + 1e-5)
    return torch.where(level == len(max_scales), UNASSIGNED, level)


def pool_regions(
    features: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor | int,
    pooler: ROIPooler,
    view_size: tuple[int, int],
) -> Tensor:
    """RoIAlign the boxes of each image of a batch: :func:`pool_boxes` on ``(B, K)`` slots.

    Args:
        features: one ``(B, C, H_l, W_l)`` a level, in the pooler's order.
        boxes: ``(B, K, 4)`` XYXY in view pixels, on the CPU.
        levels: ``(B, K)`` level indices on the CPU, or one for all; :data:`UNASSIGNED` pools from
            the last level.
        pooler: the detector's ``box_pooler``; its level poolers are used as they are.
        view_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``(B * K, C, S, S)`` float32.
    """
    image = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    levels = levels if isinstance(levels, int) else levels.reshape(-1)
    return pool_boxes(features, boxes.reshape(-1, 4), image, levels, pooler, view_size)


@torch.compiler.disable  # which box goes where differs from batch to batch
def pool_boxes(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    levels: Tensor | int,
    pooler: ROIPooler,
    view_size: tuple[int, int],
) -> Tensor:
    """RoIAlign each box on its level with the detector's pooler.

    Boxes are scaled by the map's own size over the view's, which is the pooler's spatial scale
    where the view's sides divide by the stride (P5 of a 112 view is 4 wide, not 3.5).

    Boxes are sorted by level on the CPU and travel in one copy, so nothing waits for the device.

    Args:
        features: one ``(B, C, H_l, W_l)`` a level, in the pooler's order.
        boxes: ``(R, 4)`` XYXY in view pixels, on the CPU; R may be 0.
        image: ``(R,)`` int64 on the CPU: which image of the batch each box is of.
        levels: ``(R,)`` level indices on the CPU, or one for all; :data:`UNASSIGNED` pools from
            the last level.
        pooler: the detector's ``box_pooler``; its level poolers are used as they are.
        view_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``(R, C, S, S)`` float32.
    """
    image, device = image[:, None].to(boxes.dtype), features[0].device
    ratios = boxes.new_tensor(
        [
            [feature.shape[-1] / view_size[1] / level_pooler.spatial_scale]
            + [feature.shape[-2] / view_size[0] / level_pooler.spatial_scale]
            for feature, level_pooler in zip(features, pooler.level_poolers, strict=True)
        ]
    ).repeat(
        1, 2
    )  # (L, 4)
    if len(features) == 1:
        levels = 0
    if isinstance(levels, int):
        rois = torch.cat([image, boxes * ratios[levels]], dim=1).to(device, non_blocking=True)
        return pooler.level_poolers[levels](features[levels].float(), rois)

    levels = levels.where(levels != UNASSIGNED, len(features) - 1)
    order = torch.argsort(levels, stable=True)
    rois = torch.cat([image, boxes * ratios[levels]], dim=1)[order].to(device, non_blocking=True)
    parts = rois.split(torch.bincount(levels, minlength=len(features)).tolist())
    # Levels without a box still take part, so that every parameter has a gradient on every rank.
    pooled = [
        level_pooler(feature.float(), part)
        for feature, level_pooler, part in zip(features, pooler.level_poolers, parts, strict=True)
    ]
    back = torch.argsort(order).to(device, non_blocking=True)
    return torch.cat(pooled).index_select(0, back)
