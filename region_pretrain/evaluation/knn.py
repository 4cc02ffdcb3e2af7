"""Nearest-neighbour classification of feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1024


@torch.no_grad()
def knn_classify(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Classify vectors by a weighted k-nearest-neighbour vote with cosine similarity.

    Each of the ``k`` nearest neighbours votes for its class with ``exp(similarity / temperature)``
    (Wu et al. 2018, section 3.4).

    Args:
        features: (N, D) float; normalised here.
        labels: (N,) int64, non-negative.
        test_features: (M, D); None: each of the N vectors is classified by the N - 1 others.
        k: number of neighbours; all if there are fewer.
        temperature: temperature of the votes.

    Returns:
        The classes with the most votes (M,), int64.

    Raises:
        ValueError: there are no test vectors, or no neighbours.
    """
    leave_one_out = test_features is None
    if leave_one_out:
        test_features = features
    k = min(k, len(features) - leave_one_out)
    if k < 1 or len(test_features) == 0:
        raise ValueError(f"kNN of {len(test_features)} vectors by {len(features)} is undefined")
    known = F.normalize(features.float(), dim=1)
    classes = int(labels.max()) + 1
    predicted = []
    for start in range(0, len(test_features), _CHUNK):
        query = F.normalize(test_features[start : start + _CHUNK].float(), dim=1)
        similarity = query @ known.T  # (chunk, N)
        if leave_one_out:
            rows = torch.arange(len(query), device=query.device)
            similarity[rows, rows + start] = -torch.inf
        nearest, index = similarity.topk(k, dim=1)
        # 1 is the maximum similarity: subtracting it avoids overflow at small temperatures.
        weight = ((nearest - 1) / temperature).exp()
        votes = weight.new_zeros(len(query), classes).scatter_add_(1, labels[index], weight)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
