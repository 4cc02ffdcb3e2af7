"""InfoNCE against gathered keys, compared with a slow restatement."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from region_pretrain.projects.mcl.contrast import gathered_info_nce


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_info_nce_against_a_slow_restatement(temperature):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((7, 6)), rng.standard_normal((5, 6))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    positives = [0, 4, 4, 2, 1, 3, 0]
    loss, own, others = 0.0, [], []
    for i, y in enumerate(positives):
        scores = [float(np.dot(q[i], k[j])) for j in range(5)]
        weights = [np.exp(s / temperature) for s in scores]
        loss -= np.log(weights[y] / sum(weights)) / 7
        own.append(scores[y])
        others += [s for j, s in enumerate(scores) if j != y]
    found = gathered_info_nce(
        torch.from_numpy(q), torch.from_numpy(k), torch.tensor(positives), temperature
    )
    assert found.loss.item() == pytest.approx(loss, abs=1e-9)
    assert found.positive.item() == pytest.approx(np.mean(own), abs=1e-9)
    assert found.negative.item() == pytest.approx(np.mean(others), abs=1e-9)


def test_keys_get_no_gradient_and_mixed_precision_changes_nothing():
    q = F.normalize(torch.randn(4, 8), dim=1).requires_grad_()
    k = F.normalize(torch.randn(6, 8), dim=1).requires_grad_()
    positives = torch.arange(4)
    plain = gathered_info_nce(q, k, positives).loss
    plain.backward()
    assert k.grad is None and q.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gathered_info_nce(q, k, positives).loss
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)


def test_a_single_key_has_no_negatives():
    found = gathered_info_nce(torch.eye(3)[:1], torch.eye(3)[:1], torch.tensor([0]))
    assert found.loss.item() == 0 and found.positive.item() == 1 and found.negative.item() == 0
