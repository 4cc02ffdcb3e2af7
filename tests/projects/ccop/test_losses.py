"""The intra-image loss and its pairs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from region_pretrain.projects.ccop.losses import distinct_pairs, intra_image_margin

SPREAD = torch.tensor([[[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9.0]]])


def from_similarity(similarity, pairs, anchor="column"):
    """Mean loss for a given S: keys are unit axes, queries the rows of S."""
    query = torch.tensor([similarity], requires_grad=True)
    key = torch.eye(query.shape[1])[None]
    total = intra_image_margin(query, key, pairs, 0.4, anchor)
    return total / pairs.sum(), query


@pytest.mark.parametrize(("anchor", "loss"), [("column", 0.1), ("row", 0.3)])
def test_two_disjoint_regions(anchor, loss):
    pairs = distinct_pairs(SPREAD[:, :2], torch.ones(1, 2).bool(), 0.05)
    assert pairs.tolist() == [[[False, True], [True, False]]]
    found, _ = from_similarity([[0.9, 0.1], [0.7, 0.5]], pairs, anchor)
    assert found.item() == pytest.approx(loss, abs=1e-6)


def test_overlapping_regions_are_not_a_pair():
    boxes = SPREAD.clone()
    boxes[0, 1] = torch.tensor([0, 0, 9, 4.0])
    pairs = distinct_pairs(boxes, torch.ones(1, 3).bool(), 0.05)
    assert pairs[0].int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    similarity = [[0.8, 0.6, 0.3], [0.2, 0.7, 0.5], [0.1, 0.65, 0.9]]
    found, _ = from_similarity(similarity, pairs)
    assert found.item() == pytest.approx(0.0875, abs=1e-6)


def test_the_iou_bound_is_exclusive():
    """Squares of 10 that are 6 apart overlap by 4 / 16."""
    boxes = torch.tensor([[[0, 0, 10, 10], [6, 0, 16, 10.0]]])
    both = torch.ones(1, 2).bool()
    assert not distinct_pairs(boxes, both, 0.25).any()
    assert distinct_pairs(boxes, both, 0.2501).sum() == 2


def test_empty_slots_and_regions_without_area_are_not_pairs():
    boxes = SPREAD.clone()
    pairs = distinct_pairs(boxes, torch.tensor([[True, True, False]]), 0.05)
    assert pairs.sum() == 2 and not pairs[0, 2].any() and not pairs[0, :, 2].any()
    boxes[0, :2, 2] = boxes[0, :2, 0]
    assert not distinct_pairs(boxes, torch.ones(1, 3).bool(), 0.05)[0, 0, 1]


@pytest.mark.parametrize("anchor", ["column", "row"])
def test_against_a_slow_restatement(anchor):
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 4, 5, 8))
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    pairs = rng.random((4, 5, 5)) < 0.5
    pairs[:, range(5), range(5)] = False
    slow = 0.0
    for b in range(4):
        for i in range(5):
            for j in range(5):
                if pairs[b, i, j]:
                    own = j if anchor == "column" else i
                    difference = query[b, i] @ key[b, j] - query[b, own] @ key[b, own]
                    slow += max(0.0, difference + 0.4)
    fast = intra_image_margin(*map(torch.from_numpy, (query, key, pairs)), 0.4, anchor)
    assert fast.item() == pytest.approx(slow, abs=1e-9)


def test_gradient_reaches_both_queries_and_no_key():
    query = F.normalize(torch.randn(1, 2, 8), dim=-1).requires_grad_()
    key = query.detach().flip(1).requires_grad_()  # each key is nearer to the other query
    pairs = torch.tensor([[[False, True], [False, False]]])
    intra_image_margin(query, key, pairs, 0.4).backward()
    assert key.grad is None
    torch.testing.assert_close(query.grad[0, 0], key[0, 1].detach())  # S_01 rises with q_0
    torch.testing.assert_close(query.grad[0, 1], -key[0, 1].detach())  # S_11 falls with q_1


def test_without_pairs_the_loss_is_zero_and_connected():
    query = F.normalize(torch.randn(2, 3, 8), dim=-1).requires_grad_()
    loss = intra_image_margin(query, query.detach(), torch.zeros(2, 3, 3).bool(), 0.4)
    loss.backward()
    assert loss.item() == 0 and query.grad.abs().sum() == 0
