"""CCOP under bfloat16 autocast."""

import pytest
import torch
from torch.nn import functional as F

from region_pretrain.projects.ccop.candidates import Candidates, choose_positives


@pytest.mark.parametrize("rounded", [False, True])
def test_the_hardest_candidate_is_chosen_in_float32(rounded):
    """Two candidates whose cosines differ by 1e-4, which bfloat16 cannot tell apart."""
    query = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    other = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    other = F.normalize(other - (other @ query.T) * query, dim=1)
    cosines = torch.tensor([0.7001, 0.7000, 0.7002])
    vectors = cosines[:, None] * query + (1 - cosines**2).sqrt()[:, None] * other
    boxes = torch.tensor([[[0.0, 0, 9, 9]] * 3])
    candidates = Candidates(boxes, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        choice = choose_positives(query, vectors, candidates, hardest=True)
    assert choice.index.tolist() == [1]
    assert choice.similarity.dtype == torch.float32
    torch.testing.assert_close(choice.similarity, cosines[1:2], rtol=0, atol=1e-6)
