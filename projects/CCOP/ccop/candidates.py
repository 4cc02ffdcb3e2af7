"""Candidate positives: jittered copies of a key region, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from torch import Tensor

from region_pretrain.data.device import to_device
from region_pretrain.projects.ccop.curriculum import Difficulty


@dataclass
class Candidates:
    """The candidates of each region, on the CPU; the last one is the region itself.

    Attributes:
        boxes: ``(..., n + 1, 4)`` float32 XYXY in view pixels.
        iou: ``(..., n + 1)`` float32, IoU with the region.
        valid: ``(..., n + 1)`` bool, may be chosen; always true for the region itself.
    """

    boxes: Tensor
    iou: Tensor
    valid: Tensor

    def of(self, regions: Tensor) -> Candidates:
        """The candidates of those regions that a mask over the leading dimensions selects."""
        return Candidates(self.boxes[regions], self.iou[regions], self.valid[regions])


@dataclass
class Positives:
    """The chosen candidates of R regions.

    Attributes:
        index: ``(R,)`` int64, number of the candidate.
        vectors: ``(R, D)`` unit vectors of the key network.
        similarity: ``(R,)`` cosine similarity with the query.
        iou: ``(R,)`` IoU with the region.
    """

    index: Tensor
    vectors: Tensor
    similarity: Tensor
    iou: Tensor


def draw_noise(seed: int, iteration: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw uniform noise for the candidates of a batch's images.

    Each image has its own generator: the noise depends neither on the number of processes nor on
    earlier draws, so a resumed run draws the same.

    Args:
        seed: the run's seed.
        iteration: number of the iteration, from 0.
        indices: the images' positions in the data set.
        shape: shape of one image's noise.

    Returns:
        ``(B, *shape)`` float32 in [-0.5, 0.5).
    """
    draws = [
        np.random.default_rng([seed, iteration, int(i)]).random(shape, np.float32) for i in indices
    ]
    return torch.from_numpy(np.stack(draws)) - 0.5


def jitter_boxes(boxes: Tensor, noise: Tensor, difficulty: Difficulty) -> Tensor:
    """Shift centres and scale sides (released code).

    With the difficulty's ranges a (center) and b (log_size) and noise u: ``cx + w a u1``,
    ``cy + h a u2``, ``w exp(b u3)``, ``h exp(b u4)``.

    Args:
        boxes: ``(..., 4)`` XYXY.
        noise: ``(..., n, 4)`` in [-0.5, 0.5].
        difficulty: the step's difficulty.

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
    """Jitter regions, clip them to the view, and mark those whose IoU is high enough.

    Args:
        boxes: ``(..., 4)`` XYXY in view pixels, on the CPU.
        noise: ``(..., n, 4)`` in [-0.5, 0.5].
        difficulty: the step's difficulty.
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
    iou = iou.nan_to_num(0.0)  # boxes without area
    iou[..., -1] = 1.0
    return Candidates(candidates, iou, iou >= difficulty.iou_floor)


def hardest_valid(similarity: Tensor, valid: Tensor) -> Tensor:
    """Choose the valid candidate that is least similar to the query.

    Args:
        similarity: ``(R, n)``.
        valid: ``(R, n)`` bool, at least one per row.

    Returns:
        ``(R,)`` int64.
    """
    return similarity.masked_fill(~valid, float("inf")).argmin(dim=1)


def choose_positives(
    query: Tensor, vectors: Tensor, candidates: Candidates, hardest: bool
) -> Positives:
    """Choose one of each region's valid candidates as its positive.

    Args:
        query: ``(R, D)`` unit vectors.
        vectors: ``(C, D)`` unit vectors of the valid candidates, region by region.
        candidates: ``(R, n + 1)`` candidates.
        hardest: choose the candidate least similar to the query; False: a random one.
    """
    device = query.device
    valid = to_device(candidates.valid, device)
    slots = to_device(candidates.valid.flatten().nonzero().squeeze(1), device)
    vectors = to_slots(vectors, slots, valid.shape)  # (R, n + 1, D)
    with torch.autocast(device.type, enabled=False):  # bfloat16 would choose another candidate
        similarity = torch.einsum("rd,rnd->rn", query, vectors)
    order = similarity if hardest else torch.rand_like(similarity)
    index = hardest_valid(order, valid)
    pick = index[:, None]
    return Positives(
        index,
        vectors.gather(1, pick[..., None].expand(-1, -1, vectors.shape[-1])).squeeze(1),
        similarity.gather(1, pick).squeeze(1),
        to_device(candidates.iou, device).gather(1, pick).squeeze(1),
    )


def to_slots(vectors: Tensor, slots: Tensor, shape: Sequence[int]) -> Tensor:
    """Scatter vectors into slots; empty slots are zero.

    Args:
        vectors: ``(N, D)``.
        slots: ``(N,)`` int64, the vectors' positions in the flattened slots.
        shape: shape of the slots.

    Returns:
        ``(*shape, D)``.
    """
    flat = vectors.new_zeros((math.prod(shape), vectors.shape[1]))
    return flat.index_copy(0, slots, vectors).view(*shape, vectors.shape[1])
