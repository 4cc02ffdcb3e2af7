"""Batch norm in a head that receives a single region, or none, in one process."""

import pytest
import torch
from torch import nn

from region_pretrain.modeling.heads import MLPHead


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_a_single_vector_is_normalised_by_running_statistics(norm):
    torch.manual_seed(0)
    head = MLPHead(5, 7, 3, norm=norm).train()
    for _ in range(3):
        head(torch.randn(16, 5))
    state = {name: value.clone() for name, value in head.state_dict().items()}
    x = torch.randn(1, 5, requires_grad=True)
    out = head(x)
    linear, last = (m for m in head if isinstance(m, nn.Linear))
    mean, var = (state[f"1.norm.running_{name}"] for name in ("mean", "var"))
    hidden = (linear(x) - mean) / (var + 1e-5).sqrt()
    hidden = hidden * state["1.norm.weight"] + state["1.norm.bias"]
    torch.testing.assert_close(out, last(hidden.relu()))
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    for name, value in head.state_dict().items():
        assert torch.equal(value, state[name]), name  # one value says nothing of a variance


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_no_vector_leaves_the_statistics_alone(norm):
    head = MLPHead(5, 7, 3, norm=norm).train()
    state = {name: value.clone() for name, value in head.state_dict().items()}
    out = head(torch.zeros(0, 5))
    assert out.shape == (0, 3)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    for name, value in head.state_dict().items():
        assert torch.equal(value, state[name]), name
