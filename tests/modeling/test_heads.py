"""Projection heads, layer by layer."""

import pytest
import torch
import torch.nn.functional as F

from region_pretrain.errors import UserError
from region_pretrain.modeling.heads import MLPHead


@pytest.mark.parametrize("final_norm", [False, True])
def test_head_is_its_layers(final_norm):
    torch.manual_seed(0)
    head = MLPHead(6, 10, 4, norm="BN", final_norm=final_norm)
    assert ("4.norm.running_mean" in head.state_dict()) == final_norm
    assert not any(name.startswith("4.") for name, _ in head.named_parameters())
    x = torch.randn(7, 6)
    state = dict(head.named_parameters())
    hidden = F.linear(x, state["0.weight"], state["0.bias"])
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    hidden = (hidden * state["1.norm.weight"] + state["1.norm.bias"]).clamp(min=0)
    out = F.linear(hidden, state["3.weight"], state["3.bias"])
    if final_norm:
        out = (out - out.mean(0)) / (out.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), out, rtol=1e-4, atol=1e-5)


def test_norms_that_need_equal_counts_are_refused():
    with pytest.raises(UserError, match="norm=naiveSyncBN needs as many vectors in each process"):
        MLPHead(6, 10, 4, norm="naiveSyncBN")


def test_final_norm_needs_a_batch_norm():
    with pytest.raises(UserError, match="final_norm=True needs a batch norm"):
        MLPHead(6, 10, 4, norm="", final_norm=True)
