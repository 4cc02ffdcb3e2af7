"""Features at points, sums in slices, and the affinity head."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from region_pretrain.projects.point_region_contrast import AffinityHead
from region_pretrain.projects.point_region_contrast.points import bilinear_weights, cell_centers
from region_pretrain.projects.point_region_contrast.recompute import (
    entries_at_once,
    recomputed_sum,
)


@pytest.mark.parametrize("map_size", [(7, 7), (5, 9), (1, 2)])
def test_weights_are_grid_sample(map_size):
    torch.manual_seed(0)
    points = torch.rand(2, 50, 2) * torch.tensor([100.0, 60.0])
    features = torch.randn(2, 3, *map_size)
    weights = bilinear_weights(points, (60, 100), map_size)
    found = weights @ features.flatten(2).transpose(1, 2)
    grid = points / torch.tensor([50.0, 30.0]) - 1
    sampled = F.grid_sample(features, grid[:, :, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(found, sampled[..., 0].transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert ((weights > 0).sum(dim=2) <= 4).all()
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 50))


def test_weights_at_cells_are_upsampling():
    features = torch.randn(1, 2, 7, 7)
    weights = bilinear_weights(cell_centers(56, (224, 224)), (224, 224), (7, 7))
    up = F.interpolate(features, size=(56, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features.flatten(2) @ weights.T, up.flatten(2), rtol=1e-4, atol=1e-5)
    assert cell_centers(2, (10, 20)).tolist() == [[5, 2.5], [15, 2.5], [5, 7.5], [15, 7.5]]


def test_a_sum_over_slices_is_the_sum():
    x = torch.randn(10, 4, requires_grad=True)
    whole = x.exp().sum()
    (expected,) = torch.autograd.grad(whole, x)
    for step in (0, 3, 10, 99):
        sizes = []

        def part(rows, sizes=sizes):
            sizes.append(rows.stop - rows.start)
            return x[rows].exp().sum()

        total = recomputed_sum(part, 10, step)
        first = list(sizes)
        torch.testing.assert_close(total, whole)
        torch.testing.assert_close(torch.autograd.grad(total, x)[0], expected)
        assert sum(first) == 10 and max(first) <= max(step, 1)
        recomputed = len(first) if step < 10 else 0  # a single slice is kept instead
        assert len(sizes) == len(first) + recomputed


def test_slices_follow_the_memory_of_a_gpu(monkeypatch):
    memory = {"small": 16 << 30, "large": 80 << 30}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(total_memory=memory[d.name])
    )
    found = {n: entries_at_once(SimpleNamespace(type="cuda", name=n)) for n in memory}
    assert found == {"small": 1 << 24, "large": 5 << 24}
    assert entries_at_once(torch.device("cpu")) == 1 << 22


def test_an_affinity_head_is_its_layers():
    head = AffinityHead(6, 32, 3, norm="BN", prototypes=4)
    assert [type(m).__name__ for m in head.mlp] == (
        ["Linear", "VectorNorm", "ReLU", "Linear", "VectorNorm", "ReLU", "Linear"]
    )
    shapes = [(m.in_features, m.out_features) for m in head.mlp if isinstance(m, torch.nn.Linear)]
    assert shapes == [(6, 32), (32, 32), (32, 3)] and head.prototypes.shape == (4, 3)
    assert all(head.mlp[i].bias.abs().sum() == 0 for i in (0, 3, 6))
    assert all(0 < head.mlp[i].weight.std() < 0.05 for i in (0, 3, 6))
    x = torch.randn(8, 6)
    torch.testing.assert_close(head(x), F.normalize(head.mlp(x), dim=1))
    torch.testing.assert_close(head(x).norm(dim=1), torch.ones(8))
    torch.testing.assert_close(head.directions(), F.normalize(head.prototypes, dim=1))
    plain = AffinityHead(6, 32, 3, norm="")
    assert [type(m).__name__ for m in plain.mlp] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert plain.directions() is None
