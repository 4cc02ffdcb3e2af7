"""Boxes of the clusters of a feature map."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS = 10


def cluster_boxes(
    features: Tensor, clusters: Sequence[int], size: tuple[int, int]
) -> list[np.ndarray]:
    """The boxes around the connected components of clusters of similar features.

    The features of an image are centred and normalised, and clustered by spherical k-means. Their
    similarities to the cluster centers are upsampled, and each pixel belongs to the most similar
    one.

    Args:
        features: ``(B, C, h, w)`` maps of ``B`` images, which are clustered independently.
        clusters: numbers of clusters; k-means runs once for each.
        size: ``(width, height)`` of the upsampled maps.

    Returns:
        For each image ``(N, 4)`` float32 XYXY in pixels of the upsampled maps, half-open.
    """
    batch, _, height, width = features.shape
    vectors = features.float().flatten(2).transpose(1, 2)  # (B, h * w, C)
    vectors = F.normalize(vectors - vectors.mean(dim=1, keepdim=True), dim=2)
    found: list[list[np.ndarray]] = [[] for _ in range(batch)]
    for k in clusters:
        similar = spherical_kmeans(vectors, k) @ vectors.transpose(1, 2)  # (B, k, h * w)
        similar = similar.view(batch, k, height, width)
        similar = F.interpolate(similar, size[::-1], mode="bilinear", align_corners=False)
        labels = similar.argmax(dim=1).to(torch.uint8).cpu().numpy()
        for boxes, image in zip(found, labels, strict=True):
            boxes.append(component_boxes(image))
    return [np.concatenate(boxes) for boxes in found]


def spherical_kmeans(vectors: Tensor, k: int) -> Tensor:
    """k-means with cosine similarity, without random numbers.

    The first center is the vector that is least similar to the mean, and each further one the
    vector that is least similar to all centers before it.

    Args:
        vectors: ``(B, N, C)`` unit vectors; the ``B`` sets are clustered independently.
        k: number of clusters.

    Returns:
        ``(B, k, C)`` unit vectors.
    """
    closest = vectors @ vectors.mean(dim=1, keepdim=True).transpose(1, 2)  # (B, N, 1)
    chosen: list[Tensor] = []
    for _ in range(k):
        index = closest.argmin(dim=1, keepdim=True).expand(-1, -1, vectors.shape[2])
        center = vectors.gather(1, index)  # (B, 1, C)
        similar = vectors @ center.transpose(1, 2)
        closest = torch.maximum(closest, similar) if chosen else similar
        chosen.append(center)
    centers = torch.cat(chosen, dim=1)
    for _ in range(_ITERATIONS):
        nearest = (vectors @ centers.transpose(1, 2)).argmax(dim=2)
        members = F.one_hot(nearest, k).to(vectors.dtype)  # (B, N, k)
        sums = members.transpose(1, 2) @ vectors
        norms = sums.norm(dim=2, keepdim=True)
        centers = torch.where(norms > 0, sums / norms.clamp(min=1e-12), centers)
    return centers


def component_boxes(labels: np.ndarray) -> np.ndarray:
    """The boxes around the 4-connected components of each label.

    Args:
        labels: ``(H, W)`` uint8.

    Returns:
        ``(N, 4)`` float32 XYXY, half-open.
    """
    boxes = []
    for label in np.unique(labels):
        mask = (labels == label).view(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        x, y, width, height = stats[1:, :4].T  # row 0 is the rest of the image
        boxes.append(np.stack([x, y, x + width, y + height], axis=1))
    return np.concatenate(boxes).astype(np.float32)
