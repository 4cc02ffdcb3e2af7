"""The distillation of affinities against a direct computation and known values."""

import pytest
import torch
import torch.nn.functional as F

from region_pretrain.errors import UserError
from region_pretrain.projects.point_region_contrast import AffinityDistillation, AffinityHead
from region_pretrain.projects.point_region_contrast import distillation as distillation_module
from region_pretrain.projects.point_region_contrast.distillation import AffinityVectors
from region_pretrain.projects.point_region_contrast.points import bilinear_weights


def vectors(seed: int, batch: int = 2, places: int = 49, dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, places, dim, generator=generator), dim=2)


@pytest.mark.parametrize(("teacher_temperature", "loss"), [(0.07, 0.07475), (0.04, 0.00952)])
def test_values_of_one_row(teacher_temperature, loss):
    """Three places of the key view, with given affinities."""
    distillation = AffinityDistillation(1, 0.1, (teacher_temperature, teacher_temperature))
    distillation._spread = lambda size, like: torch.eye(3)
    key = torch.eye(3)[None]
    student = torch.zeros(1, 3, 3)
    student[0, 0] = torch.tensor([1.0, 0.5, 0.0])
    teacher = torch.zeros(1, 3, 3)
    teacher[0, 0] = torch.tensor([0.9, 0.6, 0.1])
    first = torch.tensor([[[1.0, 0.0, 0.0]]])
    total, count = distillation(
        AffinityVectors(student, None),
        AffinityVectors(teacher, None),
        key,
        (first, first),
        torch.ones(1, 1, dtype=torch.bool),
        (1, 3),
        1.0,
    )
    assert count == 1 and float(total) == pytest.approx(loss, abs=1e-5)


def test_it_equals_the_direct_computation(monkeypatch):
    """Upsample to 56 x 56 first, compute every affinity, then select the places."""
    one_image = 1
    monkeypatch.setattr(distillation_module, "entries_at_once", lambda device: one_image)
    size, cells = (7, 7), 56
    student, teacher, key = (vectors(seed) for seed in range(3))
    student.requires_grad_()
    generator = torch.Generator().manual_seed(9)
    at = [torch.randint(0, cells**2, (2, 5), generator=generator) for _ in range(2)]
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])

    def long(x):
        grid = x.transpose(1, 2).unflatten(2, size)
        up = F.interpolate(grid, size=(cells, cells), mode="bilinear", align_corners=False)
        return up.flatten(2).transpose(1, 2)

    rows = [
        long(x)[torch.arange(2)[:, None], where] @ long(key).transpose(1, 2)
        for x, where in zip((student, teacher), at, strict=True)
    ]
    target = (rows[1] / 0.05).softmax(dim=2)
    entropy = -(target * (rows[0] / 0.1).log_softmax(dim=2)).sum(dim=2)
    expected = entropy[valid].sum()
    (expected_gradient,) = torch.autograd.grad(expected, student)

    distillation = AffinityDistillation(cells, 0.1, (0.05, 0.05))
    places = tuple(
        bilinear_weights(torch.stack([w % cells, w // cells], dim=2) + 0.5, (cells, cells), size)
        for w in at
    )
    networks = [AffinityVectors(x, None) for x in (student, teacher)]
    total, count = distillation(*networks, key, places, valid, size, 0.5)
    assert count == 7
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    shown = distillation.affinities(*networks, key, places, size)
    torch.testing.assert_close(shown[1].flatten(2), (rows[1] / 0.1).softmax(dim=2))


def test_without_places_the_loss_is_zero_and_connected():
    student = vectors(0).requires_grad_()
    weights = torch.zeros(2, 4, 49)
    total, count = AffinityDistillation(cells=7)(
        AffinityVectors(student, None),
        AffinityVectors(vectors(1), None),
        vectors(2),
        (weights, weights),
        torch.zeros(2, 4, dtype=torch.bool),
        (7, 7),
        0.0,
    )
    assert total == 0 and count == 0
    total.backward()
    assert (student.grad == 0).all()


def test_the_teachers_temperature():
    released = AffinityDistillation(warmup=0.29)  # a table of 30 entries, 0 to 29, of 100 epochs
    assert released.temperature_at(0.0) == 0.04
    assert released.temperature_at(0.15) == pytest.approx(0.05552, abs=1e-5)
    assert released.temperature_at(0.29) == released.temperature_at(0.99) == 0.07
    assert AffinityDistillation().temperature_at(0.15) == pytest.approx(0.055)
    # It is a fraction of the training: longer runs do not overrun a table.
    assert [AffinityDistillation().temperature_at(e / 800) for e in (240, 799)] == [0.07, 0.07]
    assert AffinityDistillation(warmup=0.0).temperature_at(0.0) == 0.07


def test_the_center_is_subtracted_from_the_prototypes():
    torch.manual_seed(0)
    heads = [AffinityHead(8, 16, 8, norm="", prototypes=6) for _ in range(2)]
    student, teacher, key = (vectors(seed, places=4) for seed in range(3))
    networks = [
        AffinityVectors(x, h.directions()) for x, h in zip((student, teacher), heads, strict=True)
    ]
    assert torch.allclose(networks[0].directions.norm(dim=1), torch.ones(6))
    at = torch.eye(4)[None].expand(2, -1, -1)
    valid = torch.ones(2, 4, dtype=torch.bool)
    distillation = AffinityDistillation(2, 0.1, (0.05, 0.05), prototypes=6).train()
    distillation.center.copy_(torch.linspace(-0.1, 0.1, 6))
    old = distillation.center.clone()
    arguments = (key, (at, at), valid, (2, 2), 0.0)
    alone = AffinityDistillation(2, 0.1, (0.05, 0.05))
    plain = [d._replace(directions=None) for d in networks]
    extra = distillation(*networks, *arguments)[0] - alone(*plain, *arguments)[0]
    rows = [d.vectors @ d.directions.T for d in networks]
    target = ((rows[1] - old) / 0.05).softmax(dim=2)
    expected = -(target * (rows[0] / 0.1).log_softmax(dim=2)).sum()
    torch.testing.assert_close(extra, expected, rtol=1e-5, atol=1e-4)
    extra.backward()
    assert torch.equal(distillation.center, old)  # it moves after the step
    distillation.move_center()
    torch.testing.assert_close(distillation.center, 0.9 * old + 0.1 * rows[1].mean(dim=(0, 1)))
    assert heads[0].prototypes.grad.abs().sum() > 0 and heads[1].prototypes.grad is None


def test_the_center_moves_by_a_tenth():
    distillation = AffinityDistillation(2, prototypes=3)
    ones = AffinityVectors(torch.full((1, 4, 1), 1.0), torch.ones(3, 1))
    at, valid = torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool)
    for expected in (0.1, 0.19):
        distillation._add_similarities(ones, at, valid, 4)
        distillation.move_center()
        torch.testing.assert_close(distillation.center, torch.full((3,), expected))
        distillation.move_center()  # nothing to move towards
        torch.testing.assert_close(distillation.center, torch.full((3,), expected))


def test_the_center_moves_towards_the_mean_over_places_of_all_micro_batches():
    distillation = AffinityDistillation(2, prototypes=3)
    at = torch.eye(4)[None]
    for value, valid in ((1.0, [True, True, True, False]), (5.0, [False, False, False, True])):
        vectors = AffinityVectors(torch.full((1, 4, 1), value), torch.ones(3, 1))
        distillation._add_similarities(vectors, at, torch.tensor([valid]), sum(valid))
        assert not distillation.center.any()
    distillation.move_center()
    torch.testing.assert_close(distillation.center, torch.full((3,), 0.2))  # of (3 + 5) / 4


def test_a_batch_without_places_leaves_the_center():
    distillation = AffinityDistillation(2, prototypes=3)
    distillation.center.fill_(0.5)
    ones = AffinityVectors(torch.full((1, 4, 1), 1.0), torch.ones(3, 1))
    nowhere = torch.zeros(1, 4, dtype=torch.bool)
    distillation._add_similarities(ones, torch.eye(4)[None], nowhere, 0)
    distillation.move_center()
    assert torch.equal(distillation.center, torch.full((3,), 0.5))


def test_errors_name_the_wrong_value():
    with pytest.raises(UserError, match="teacher_temperature"):
        AffinityDistillation(teacher_temperature=(0.0, 0.07))
    with pytest.raises(UserError, match="warmup=1.5"):
        AffinityDistillation(warmup=1.5)
