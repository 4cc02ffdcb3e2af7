"""What a recomputed part of the loss reads must be the same in the forward and backward pass."""

import pytest
import torch
import torch.nn.functional as F

from region_pretrain.projects.point_region_contrast import (
    AffinityDistillation,
    AffinityHead,
    PointContrast,
)
from region_pretrain.projects.point_region_contrast.contrast import Points
from region_pretrain.projects.point_region_contrast.distillation import AffinityVectors


def unit(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def finite_differences(loss, parameter: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Central differences of a scalar function, one entry at a time."""
    gradient = torch.zeros_like(parameter)
    with torch.no_grad():
        for i in range(parameter.numel()):
            entry, old = parameter.view(-1), parameter.view(-1)[i].item()
            values = []
            for sign in (1, -1):
                entry[i] = old + sign * step
                values.append(float(loss()))
            entry[i] = old
            gradient.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return gradient


def test_the_gradient_of_prototypes_is_that_of_finite_differences():
    torch.manual_seed(0)
    heads = [AffinityHead(8, 16, 8, norm="", prototypes=6).double() for _ in range(2)]
    student, teacher, key = (unit(2, 4, 8, seed=seed) for seed in range(3))
    at, valid = torch.eye(4, dtype=torch.float64)[None].expand(2, -1, -1), torch.ones(2, 4).bool()

    def loss() -> torch.Tensor:
        distillation = AffinityDistillation(2, 0.1, (0.05, 0.05), prototypes=6).double().train()
        distillation._spread = lambda size, like: torch.eye(
            4, dtype=torch.float64
        )  # 2 x 2 to 2 x 2
        buffer = next(distillation.buffers())
        buffer.copy_(torch.linspace(-0.3, 0.3, 6))
        described = [
            AffinityVectors(x, head.directions())
            for x, head in zip((student, teacher), heads, strict=True)
        ]
        total, _ = distillation(*described, key, (at, at), valid, (2, 2), 0.0)
        assert torch.equal(buffer, torch.linspace(-0.3, 0.3, 6).double())  # for the backward pass
        return total

    loss().backward()
    expected = finite_differences(loss, heads[0].prototypes)
    torch.testing.assert_close(heads[0].prototypes.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("others", ["local", "queue"])
def test_the_gradient_of_points_is_that_of_finite_differences(others):
    """The queue is filled in the forward pass; the recomputed loss must see the old keys."""
    query = unit(2, 6, 4, seed=3).requires_grad_()
    keys = unit(2, 6, 4, seed=4)
    ids, valid = (
        torch.arange(6).div(2, rounding_mode="floor").expand(2, -1),
        torch.ones(2, 6).bool(),
    )

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        contrast = PointContrast(0.2, others=others, queue_length=8, dim=4).train()
        return contrast(Points(query, ids, valid), Points(keys, ids, valid))[0]

    loss().backward()
    # Vectors are normalised in float32.
    expected = finite_differences(loss, query.detach(), step=1e-3)
    torch.testing.assert_close(query.grad, expected, rtol=2e-2, atol=2e-2)
