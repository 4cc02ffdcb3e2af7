"""InfoNCE against known values and a slow restatement."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from region_pretrain.modeling.gather import gather_rows, mean_over_ranks
from region_pretrain.modeling.losses import info_nce


@pytest.mark.parametrize(
    ("positive", "loss"), [((1.0, 0.0, 0.0), 6.0926), ((0.0, 1.0, 0.0), 11.09037)]
)
def test_info_nce_of_orthogonal_negatives(positive, loss):
    query = torch.tensor([[1.0, 0.0, 0.0]])
    negatives = torch.tensor([0.0, 0.0, 1.0]).expand(65_536, 3)
    found = info_nce(query, torch.tensor([positive]), negatives, 0.2)
    assert found.item() == pytest.approx(loss, abs=1e-4)


def test_info_nce_against_a_slow_restatement_and_cross_entropy():
    rng = np.random.default_rng(0)
    q, k, n = (rng.standard_normal((m, 8)) for m in (5, 5, 12))
    q, k, n = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k, n))
    slow = []
    for i in range(5):
        own = math.exp(q[i] @ k[i] / 0.07)
        slow.append(-math.log(own / (own + sum(math.exp(q[i] @ n[j] / 0.07) for j in range(12)))))
    found = info_nce(*(torch.from_numpy(x) for x in (q, k, n)), 0.07)
    np.testing.assert_allclose(found.numpy(), slow, atol=1e-9)
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ n.T], axis=1) / 0.07
    stock = F.cross_entropy(torch.from_numpy(logits), torch.zeros(5, dtype=torch.int64))
    assert found.mean().item() == pytest.approx(stock.item(), abs=1e-9)


def test_keys_receive_no_gradient_and_mixed_precision_changes_nothing():
    q, k, n = (F.normalize(torch.randn(m, 8), dim=1).requires_grad_() for m in (3, 3, 6))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = info_nce(q, k, n, 0.2)
    torch.testing.assert_close(mixed, info_nce(q, k, n, 0.2), rtol=0, atol=0)
    mixed.sum().backward()
    assert k.grad is None and n.grad is None and q.grad.abs().sum() > 0


def test_without_queries_the_loss_is_zero_and_connected():
    weight = torch.ones(4, 8, requires_grad=True)
    query = torch.zeros(0, 4) @ weight
    loss = mean_over_ranks(info_nce(query, torch.zeros(0, 8), torch.zeros(6, 8), 0.2).sum(), 0)
    loss.backward()
    assert loss.item() == 0 and weight.grad.abs().sum() == 0


def test_a_single_process_has_its_own_mean_and_rows():
    assert mean_over_ranks(torch.tensor([6.0, 3.0]), 3).tolist() == [2, 1]
    for total in (torch.tensor(7.1), torch.tensor(7.1, dtype=torch.float64)):
        for count in range(1, 100):  # the correctly rounded quotient
            assert mean_over_ranks(total, torch.tensor(count)) == total / count
    rows = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(gather_rows(rows), rows) and not gather_rows(rows).requires_grad
