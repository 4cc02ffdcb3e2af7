"""Candidate positives: a key region, and jittered copies of it that still cover enough of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from torch import Tensor

from region_pretrain.projects.ccop.curriculum import Difficulty


@dataclass
class Candidates:
    """Candidates of each region, on the CPU; the last one is the region itself.

    Attributes:
        boxes: ``(..., n + 1, 4)`` float32 XYXY in view pixels.
        iou: ``(..., n + 1)`` float32 with the region.
        valid: ``(..., n + 1)`` bool: may be chosen. The region itself always may.
    """

    boxes: Tensor
    iou: Tensor
    valid: Tensor

    def of(self, regions: Tensor) -> Candidates:
        """Those of the regions where a mask over the leading dimensions is true."""
        return Candidates(self.boxes[regions], self.iou[regions], self.valid[regions])


def draw_noise(seed: int, iteration: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers for the candidates of a batch's images.

    Each image has its own generator: the numbers depend neither on the number of processes nor on
    what was drawn before, so a resumed run draws the same.

    Args:
        seed: of the run.
        iteration: from 0.
        indices: of the images in the data set.
        shape: for one image.

    Returns:
        ``(B, *shape)`` float32 in [-0.5, 0.5).
    """
    draws = [
        np.random.default_rng([seed, iteration, int(i)]).random(shape, np.float32) for i in indices
    ]
    return torch.from_numpy(np.stack(draws)) - 0.5


def jitter_boxes(boxes: Tensor, noise: Tensor, difficulty: Difficulty) -> Tensor:
    """Shift centres and scale sides (released code).

    With ranges a and b of the difficulty and draws u: ``cx + w a u1``, ``cy + h a u2``,
    ``w exp(b u3)``, ``h exp(b u4)``.

    Args:
        boxes: ``(..., 4)`` XYXY.
        noise: ``(..., n, 4)`` in [-0.5, 0.5].
        difficulty: of the step.

    Returns:
        ``(..., n, 4)`` XYXY, not clipped.
    """
    lo, hi = boxes[..., None, :2], boxes[..., None, 2:]
    side = hi - lo
    center = (lo + hi) / 2 + side * difficulty.center * noise[..., :2]
    half = side * torch.exp(difficulty.log_size * noise[..., 2:]) / 2
    return torch.cat([center - half, center + half], dim=-1)


def draw_candidates(
    boxes: Tensor, noise: Tensor, difficulty: Difficulty, view_size: tuple[int, int]
) -> Candidates:
    """Jitter regions, clip to the view, and see which copies cover enough.

    Args:
        boxes: ``(..., 4)`` XYXY in view pixels, on the CPU.
        noise: ``(..., n, 4)`` in [-0.5, 0.5].
        difficulty: of the step.
        view_size: ``(height, width)`` of the view in pixels.
    """
    height, width = view_size
    limit = boxes.new_tensor([width, height, width, height])
    jittered = jitter_boxes(boxes, noise, difficulty).clamp(min=0).minimum(limit)
    candidates = torch.cat([jittered, boxes[..., None, :]], dim=-2)
    regions = boxes[..., None, :].expand_as(candidates)
    iou = matched_pairwise_iou(
        Boxes(candidates.reshape(-1, 4)), Boxes(regions.reshape(-1, 4))
    ).view(candidates.shape[:-1])
    iou = iou.nan_to_num(0.0)  # of boxes without area
    iou[..., -1] = 1.0
    return Candidates(candidates, iou, iou >= difficulty.iou_floor)


def hardest_valid(similarity: Tensor, valid: Tensor) -> Tensor:
    """The valid candidate that is least similar to the query.

    Args:
        similarity: ``(R, n)``.
        valid: ``(R, n)`` bool, at least one in each row.

    Returns:
        ``(R,)`` int64.
    """
    return similarity.masked_fill(~valid, float("inf")).argmin(dim=1)
