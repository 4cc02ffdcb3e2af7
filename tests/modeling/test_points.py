"""Features at points, deep heads, sums in parts, and what of a pyramid is not read."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate

from region_pretrain.config import get_config
from region_pretrain.errors import UserError
from region_pretrain.modeling.heads import DeepMLPHead
from region_pretrain.modeling.points import bilinear_weights, cell_centres
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps
from region_pretrain.modeling.recompute import recomputed_sum


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
    weights = bilinear_weights(cell_centres(56, (224, 224)), (224, 224), (7, 7))
    up = F.interpolate(features, size=(56, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features.flatten(2) @ weights.T, up.flatten(2), rtol=1e-4, atol=1e-5)
    assert cell_centres(2, (10, 20)).tolist() == [[5, 2.5], [15, 2.5], [5, 7.5], [15, 7.5]]


def test_a_sum_in_parts_is_the_sum():
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
        assert sum(first) == 10 and max(first) <= max(step, 1) and len(sizes) == 2 * len(first)


def test_a_deep_head():
    head = DeepMLPHead([6, 5, 4, 3], norm="BN", init_std=0.02)
    assert [type(m).__name__ for m in head] == (
        ["Linear", "_VectorNorm", "ReLU", "Linear", "_VectorNorm", "ReLU", "Linear"]
    )
    assert head(torch.randn(8, 6)).shape == (8, 3)
    assert all(head[i].bias.abs().sum() == 0 and head[i].weight.std() < 0.05 for i in (0, 3, 6))
    with pytest.raises(UserError, match="dims=.5."):
        DeepMLPHead([5])


def test_what_is_not_read_is_frozen_and_nothing_else():
    detector = get_config("common/models/mask_rcnn_fpn_small.py").model
    for name in ("p2", "p4"):
        backbone = instantiate(detector.backbone)
        frozen = freeze_unread(backbone, [name])
        maps = pyramid_maps(backbone, torch.randn(2, 3, 64, 64), {name: slice(0, 2)})
        maps[name].square().sum().backward()
        for parameter_name, parameter in backbone.named_parameters():
            read = parameter_name.split(".")[0] not in frozen
            assert read == parameter.requires_grad == (parameter.grad is not None)
    assert frozen == ["fpn_lateral2", "fpn_output2", "fpn_lateral3", "fpn_output3", "fpn_output5"]
    assert freeze_unread(backbone.bottom_up, ["res5"]) == []
