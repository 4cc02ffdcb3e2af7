"""Accuracy of a classification."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Accuracy(NamedTuple):
    """Accuracy of a classification, each value in [0, 1].

    Attributes:
        top1: fraction of all vectors that are classified correctly.
        per_class: mean over the classes that occur of the fraction of their vectors, so that rare
            classes count as much as common ones.
    """

    top1: float
    per_class: float


def accuracy_of(predicted: Tensor, labels: Tensor) -> Accuracy:
    """Compare predicted classes with the true ones, both (N,) int64 with N > 0."""
    correct = predicted == labels
    total = torch.bincount(labels).double()
    hits = torch.bincount(labels, weights=correct.double())
    return Accuracy(int(correct.sum()) / len(labels), float((hits / total)[total > 0].mean()))
