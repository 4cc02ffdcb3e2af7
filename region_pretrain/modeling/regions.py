"""Region features: level assignment, and RoIAlign by the detector's own pooler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.modeling.pyramid import readable_names

UNASSIGNED = -1


def assign_levels(boxes: Tensor, max_scales: Sequence[float]) -> Tensor:
    """Assign boxes to pyramid levels by their scale.

    A box of scale ``s = sqrt(w h)`` goes to the first level whose bound is at least ``s``. Unlike
    in Detectron2's canonical rule (224 pixels to P4), bounds are in view pixels, so the same object
    is assigned to different levels in views of different resolution.

    Args:
        boxes: ``(..., 4)`` XYXY in view pixels, half-open.
        max_scales: largest scale of each level in pixels, ascending, e.g. (48, 96, 192, 224).

    Returns:
        ``(...)`` int64 level indices; :data:`UNASSIGNED` for boxes above the last bound.
    """
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    scale = (width * height).sqrt()
    level = torch.zeros_like(scale, dtype=torch.int64)
    for bound in max_scales:
        # The tolerance absorbs rounding errors in a box that covers the view.
        level += scale > bound * (1 + 1e-5)
    return torch.where(level == len(max_scales), UNASSIGNED, level)


def pool_regions(
    features: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor | int,
    pooler: ROIPooler,
    view_size: tuple[int, int],
) -> Tensor:
    """RoIAlign a batch's ``(B, K)`` region slots with :func:`pool_boxes`.

    Args:
        features: one ``(B, C, H_l, W_l)`` per level, in the pooler's order.
        boxes: ``(B, K, 4)`` XYXY in view pixels, on the CPU.
        levels: ``(B, K)`` level indices on the CPU, or one for all boxes; those
            :data:`UNASSIGNED` are pooled from the last level.
        pooler: the detector's ``box_pooler``.
        view_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``(B * K, C, S, S)`` float32.
    """
    image = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    levels = levels if isinstance(levels, int) else levels.reshape(-1)
    return pool_boxes(features, boxes.reshape(-1, 4), image, levels, pooler, view_size)


def check_levels(
    backbone: nn.Module,
    in_features: Sequence[str],
    pooler: nn.Module,
    max_scales: Sequence[float],
) -> None:
    """Check the maps that a pre-training model pools regions from, and their scales.

    Args:
        backbone: the detector's.
        in_features: ``model.in_features``, names of maps.
        pooler: the detector's, ``model.pooler``.
        max_scales: ``model.level_scales``, see :func:`assign_levels`. A single map has no bound.

    Raises:
        UserError: the backbone lacks a map, the pooler or the scales are for another number of
            maps, or the scales descend.
    """
    names, scales, known = list(in_features), list(max_scales), readable_names(backbone)
    if missing := [name for name in names if name not in known]:
        raise UserError(
            f"model.in_features={names}: the backbone has no {', '.join(missing)}, but "
            f"{', '.join(known)}"
        )
    count = len(getattr(pooler, "level_poolers", names))
    if count != len(names):
        raise UserError(
            f"model.in_features={names} must name {count} maps, one for each of model.pooler.scales"
        )
    if len(names) == 1:
        return
    if len(scales) != len(names):
        raise UserError(
            f"model.level_scales={scales} must give one scale for each of model.in_features={names}"
        )
    if scales != sorted(scales):
        raise UserError(
            f"model.level_scales={scales} must ascend: the first map, the finest, is that of the "
            "smallest regions"
        )


@torch.compiler.disable  # each batch assigns other boxes to the levels
def pool_boxes(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    levels: Tensor | int,
    pooler: ROIPooler,
    view_size: tuple[int, int],
) -> Tensor:
    """RoIAlign each box on its level with the detector's pooler.

    Boxes are scaled by the ratio of the map's size to the view's. This is the pooler's spatial
    scale if the view's sides are divisible by the stride (P5 of a 112-pixel view is 4 pixels wide,
    not 3.5).

    Boxes are sorted by level on the CPU and copied at once, without synchronising the device.

    Args:
        features: one ``(B, C, H_l, W_l)`` per level, in the pooler's order.
        boxes: ``(R, 4)`` XYXY in view pixels, on the CPU; R may be 0.
        image: ``(R,)`` int64 on the CPU, the index of each box's image in the batch.
        levels: ``(R,)`` level indices on the CPU, or one for all boxes; those
            :data:`UNASSIGNED` are pooled from the last level.
        pooler: the detector's ``box_pooler``.
        view_size: ``(height, width)`` of the view in pixels.

    Returns:
        ``(R, C, S, S)`` float32.
    """
    image, device = image[:, None].to(boxes.dtype), features[0].device
    ratios = boxes.new_tensor(
        [
            [
                feature.shape[-1] / view_size[1] / level_pooler.spatial_scale,
                feature.shape[-2] / view_size[0] / level_pooler.spatial_scale,
            ]
            for feature, level_pooler in zip(features, pooler.level_poolers, strict=True)
        ]
    )
    ratios = ratios.repeat(1, 2)  # (L, 4)
    if len(features) == 1:
        levels = 0
    if isinstance(levels, int):
        rois = to_device(torch.cat([image, boxes * ratios[levels]], dim=1), device)
        return pooler.level_poolers[levels](features[levels].float(), rois)

    levels = levels.where(levels != UNASSIGNED, len(features) - 1)
    order = torch.argsort(levels, stable=True)
    rois = to_device(torch.cat([image, boxes * ratios[levels]], dim=1)[order], device)
    parts = rois.split(torch.bincount(levels, minlength=len(features)).tolist())
    # Levels without boxes take part too, so that every parameter has a gradient on every rank.
    pooled = [
        level_pooler(feature.float(), part)
        for feature, level_pooler, part in zip(features, pooler.level_poolers, parts, strict=True)
    ]
    return torch.cat(pooled).index_select(0, to_device(torch.argsort(order), device))
