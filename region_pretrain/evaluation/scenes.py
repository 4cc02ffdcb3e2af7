"""What features distinguish within one image, measured without class labels."""

from __future__ import annotations

from typing import NamedTuple

import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Scale(T.Augmentation):
    """Resize an image by a fixed factor.

    Args:
        factor: ratio of the new size to the old one.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        new = (max(1, round(side * self.factor)) for side in (height, width))
        return T.ResizeTransform(height, width, *new)


#: Turns an image into its second view: mirrored, smaller, and of other brightness and contrast.
SECOND_VIEW: tuple[T.Augmentation, ...] = (
    T.RandomFlip(prob=1.0, horizontal=True),
    Scale(0.75),
    T.RandomContrast(0.7, 0.7),
    T.RandomBrightness(1.2, 1.2),
)


class Retrieval(NamedTuple):
    """How often the nearest region of the second view is the same region.

    Attributes:
        top1: fraction of the regions.
        chance: the same for a random choice among the regions of the image.
        regions: number of regions.
    """

    top1: float
    chance: float
    regions: int


def retrieve(first: Tensor, second: Tensor, images: Tensor) -> Retrieval | None:
    """Find regions again in a second view of their image, by cosine similarity.

    Args:
        first: ``(N, D)`` features of the regions in the first view.
        second: ``(N, D)`` features of the same regions in the second view.
        images: ``(N,)`` int64, the image of each region.

    Returns:
        The result over all images with at least two regions; ``None`` if there are none.
    """
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    hits = regions = candidates = 0
    for image in images.unique():
        mine = (images == image).nonzero().flatten()
        if len(mine) > 1:
            nearest = (first[mine] @ second[mine].T).argmax(dim=1)
            hits += int((nearest == torch.arange(len(mine), device=nearest.device)).sum())
            regions += len(mine)
            candidates += 1
    return Retrieval(hits / regions, candidates / regions, regions) if regions else None


def variance_within(features: Tensor, images: Tensor) -> float | None:
    """Fraction of the features' variance that lies within images.

    It is the variance within images over the total variance, both unbiased and of L2-normalised
    features: about 1 if regions of one image differ as much as those of different images, 0 if all
    regions of an image have the same features.

    Args:
        features: ``(N, D)``.
        images: ``(N,)`` int64, the image of each region.

    Returns:
        The fraction, or ``None`` if no image has two regions or all features are equal.
    """
    features = F.normalize(features.double(), dim=1)
    _, index, counts = images.unique(return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, index, features)
    means = sums / counts[:, None]
    freedom = len(features) - len(counts)
    total = (features - features.mean(dim=0)).square().sum()
    if not freedom or not total > 0:
        return None
    within = (features - means[index]).square().sum()
    return float((within / freedom) / (total / (len(features) - 1)))
