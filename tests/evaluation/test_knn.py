"""kNN against a slow loop in NumPy."""

import math

import numpy as np
import pytest
import torch

from region_pretrain.evaluation.accuracy import accuracy_of
from region_pretrain.evaluation.knn import knn_classify


def slow_accuracy(train, train_labels, test, test_labels, k, temperature, leave_out=False):
    correct = 0
    for i, (x, label) in enumerate(zip(test, test_labels, strict=True)):
        similar = []
        for j, (y, other) in enumerate(zip(train, train_labels, strict=True)):
            if not (leave_out and i == j):
                cosine = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
                similar.append((cosine, int(other)))
        votes = {}
        for cosine, other in sorted(similar, reverse=True)[:k]:
            votes[other] = votes.get(other, 0) + math.exp((cosine - 1) / temperature)
        correct += max(votes, key=votes.get) == label
    return correct / len(test)


def knn_accuracy(features, labels, test_features=None, test_labels=None, **options):
    predicted = knn_classify(features, labels, test_features, **options)
    return accuracy_of(predicted, labels if test_labels is None else test_labels).top1


def clouds(n, seed, classes=4, dim=6, spread=1.6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centers = np.random.default_rng(0).normal(size=(classes, dim))
    return centers[labels] + spread * rng.normal(size=(n, dim)), labels


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_slow_loop(k, temperature):
    (train, train_labels), (test, test_labels) = clouds(150, 1), clouds(90, 2)
    tensors = [torch.as_tensor(a) for a in (train, train_labels, test, test_labels)]
    expected = slow_accuracy(train, train_labels, test, test_labels, k, temperature)
    assert knn_accuracy(*tensors, k=k, temperature=temperature) == pytest.approx(expected)
    assert 0.3 < expected < 0.9  # neither chance nor trivial

    expected = slow_accuracy(train, train_labels, train, train_labels, k, temperature, True)
    assert knn_accuracy(*tensors[:2], k=k, temperature=temperature) == pytest.approx(expected)


def test_chunks_do_not_matter(monkeypatch):
    features, labels = (torch.as_tensor(a) for a in clouds(50, 3))
    whole = knn_accuracy(features, labels, k=5)
    monkeypatch.setattr("region_pretrain.evaluation.knn._CHUNK", 7)
    assert knn_accuracy(features, labels, k=5) == whole


def test_leave_one_out_does_not_see_itself():
    features = torch.eye(4)[[0, 0, 1, 1]] + 0.01 * torch.eye(4)
    assert knn_accuracy(features, torch.tensor([0, 0, 1, 1]), k=1) == 1.0
    # every nearest neighbour has the other class; counting itself, the accuracy would be 1
    assert knn_accuracy(features, torch.tensor([0, 1, 0, 1]), k=1) == 0.0
    assert (
        knn_accuracy(
            features, torch.tensor([0, 1, 0, 1]), features, torch.tensor([0, 1, 0, 1]), k=1
        )
        == 1.0
    )


def test_nearer_neighbours_outvote_many():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.05]])
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=4) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=4, temperature=10.0) == 1.0


def test_nothing_to_compare_is_an_error():
    one = torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="undefined"):
        knn_accuracy(*one)
    with pytest.raises(ValueError, match="undefined"):
        knn_accuracy(*one, torch.ones(0, 3), torch.zeros(0, dtype=torch.int64))
