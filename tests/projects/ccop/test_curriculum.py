"""Curriculum and candidates: the method's values."""

import math

import numpy as np
import pytest
import torch

from region_pretrain.errors import UserError
from region_pretrain.projects.ccop import Curriculum, Difficulty, Feedback
from region_pretrain.projects.ccop.candidates import (
    draw_candidates,
    draw_noise,
    hardest_valid,
    jitter_boxes,
)

VIEW = (224, 224)
START = Difficulty(0.15, 0.35, 0.8)


@pytest.mark.parametrize(
    ("t", "iou_floor", "center", "log_size"),
    [
        (0, 0.8, 0.15, 0.35),
        (92_400, 0.7, 0.2625, 0.6125),
        (184_800, 0.6, 0.375, 0.875),
        (369_600, 0.4, 0.6, 1.4),
        (400_000, 0.4, 0.6, 1.4),  # beyond the end it stays
    ],
)
def test_ranges_and_iou_floor(t, iou_floor, center, log_size):
    assert Curriculum().at(t / 369_600) == pytest.approx((center, log_size, iou_floor))


def test_levels_go_from_the_first_step_to_the_runs_length():
    curriculum = Curriculum()
    curriculum.step(0, 8)
    assert curriculum.level == 1 / 8
    assert curriculum.step(7, 8) == curriculum.at(1.0)
    assert curriculum.step(12, 8) == curriculum.at(1.0)


@pytest.mark.parametrize(
    ("p", "shift", "low", "high"), [(0, 0.075, 0.839, 1.191), (1, 0.3, 0.497, 2.014)]
)
def test_extremes_of_shift_and_scale(p, shift, low, high):
    box = torch.tensor([100.0, 100.0, 140.0, 120.0])
    noise = torch.tensor([[0.5, 0.5, -0.5, 0.5]])
    x1, y1, x2, y2 = jitter_boxes(box, noise, Curriculum().at(p))[0].tolist()
    assert (x1 + x2) / 2 == pytest.approx(120 + shift * 40, abs=1e-3)
    assert (y1 + y2) / 2 == pytest.approx(110 + shift * 20, abs=1e-3)
    assert (x2 - x1) / 40 == pytest.approx(low, abs=1e-3)
    assert (y2 - y1) / 20 == pytest.approx(high, abs=1e-3)


def test_a_jittered_box():
    box = torch.tensor([50.0, 50.0, 150.0, 150.0])
    found = draw_candidates(box, torch.full((1, 4), 0.5), START, VIEW)
    expected = [47.9377, 47.9377, 167.0623, 167.0623]
    assert found.boxes[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert found.iou[0].item() == pytest.approx(0.7047, abs=1e-4)
    assert found.valid.tolist() == [False, True]
    assert found.boxes[1].tolist() == box.tolist() and found.iou[1] == 1


@pytest.mark.parametrize(
    ("shift", "iou", "at_08", "at_07"), [(10, 9 / 11, True, True), (15, 0.7391, False, True)]
)
def test_validity_of_a_pure_shift(shift, iou, at_08, at_07):
    box = torch.tensor([50.0, 50.0, 150.0, 150.0])
    noise = torch.tensor([[shift / 100 / 0.6, 0, 0, 0]])
    for floor, valid in ((0.8, at_08), (0.7, at_07)):
        found = draw_candidates(box, noise, Difficulty(0.6, 1.4, floor), VIEW)
        assert found.iou[0].item() == pytest.approx(iou, abs=1e-4)
        assert found.valid[0].item() is valid


def test_candidates_are_clipped_before_their_iou_is_computed():
    box = torch.tensor([150.0, 100.0, 220.0, 170.0])
    found = draw_candidates(box, torch.tensor([[0.5, 0, 0, 0]]), Difficulty(0.6, 1.4, 0.4), VIEW)
    assert found.boxes[0].tolist() == pytest.approx([171, 100, 224, 170], abs=1e-3)
    assert found.iou[0].item() == pytest.approx(0.66216, abs=1e-5)


def slow_candidate(box, u, difficulty, size):
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    cx = (x1 + x2) / 2 + w * difficulty.center * u[0]
    cy = (y1 + y2) / 2 + h * difficulty.center * u[1]
    w2, h2 = w * math.exp(difficulty.log_size * u[2]), h * math.exp(difficulty.log_size * u[3])
    new = [cx - w2 / 2, cy - h2 / 2, cx + w2 / 2, cy + h2 / 2]
    new = [min(max(v, 0.0), limit) for v, limit in zip(new, size[::-1] * 2, strict=True)]
    iw = max(0.0, min(x2, new[2]) - max(x1, new[0]))
    ih = max(0.0, min(y2, new[3]) - max(y1, new[1]))
    union = w * h + (new[2] - new[0]) * (new[3] - new[1]) - iw * ih
    return new, iw * ih / union


def test_candidates_against_a_slow_restatement():
    rng = np.random.default_rng(0)
    size = (90, 120)
    lo = rng.uniform(0, 60, (3, 4, 2))
    boxes = np.concatenate([lo, lo + rng.uniform(8, 30, (3, 4, 2))], axis=2)
    noise = rng.uniform(-0.5, 0.5, (3, 4, 5, 4))
    difficulty = Curriculum().at(0.6)
    found = draw_candidates(
        torch.from_numpy(boxes).float(), torch.from_numpy(noise).float(), difficulty, size
    )
    assert found.boxes.shape == (3, 4, 6, 4)
    for index in np.ndindex(3, 4, 5):
        new, iou = slow_candidate(boxes[index[:2]], noise[index], difficulty, size)
        np.testing.assert_allclose(found.boxes[index], new, atol=1e-3)
        assert found.iou[index].item() == pytest.approx(iou, abs=1e-4)
        if abs(iou - difficulty.iou_floor) > 1e-4:
            assert found.valid[index].item() == (iou >= difficulty.iou_floor)
    assert found.valid[..., -1].all() and (found.iou[..., -1] == 1).all()


@pytest.mark.parametrize(
    ("p", "fraction", "iou"),
    [(0, 0.55, 0.81), (0.25, 0.44, 0.70), (0.5, 0.45, 0.60), (0.75, 0.54, 0.52), (1, 0.66, 0.45)],
)
def test_fraction_of_valid_candidates_over_the_curriculum(p, fraction, iou):
    box = torch.tensor([[450.0, 450.0, 550.0, 550.0]])  # far from any border
    noise = draw_noise(0, 0, [0], (1, 20_000, 4))[0]
    found = draw_candidates(box, noise, Curriculum().at(p), (1000, 1000))
    assert found.valid[0, :-1].float().mean().item() == pytest.approx(fraction, abs=0.012)
    assert found.iou[0, :-1].mean().item() == pytest.approx(iou, abs=0.01)


def test_a_region_without_area_is_its_own_only_candidate():
    flat = torch.tensor([223.0, 10.0, 223.0, 60.0])
    found = draw_candidates(flat, draw_noise(0, 0, [0], (10, 4))[0], START, VIEW)
    assert found.valid.tolist() == [False] * 10 + [True] and found.iou.isfinite().all()


@pytest.mark.parametrize(
    ("similarity", "valid", "chosen"),
    [([0.9, 0.2, 0.6], [1, 0, 1], 2), ([0.1, 0.2, 0.95], [0, 0, 1], 2)],
)
def test_the_hardest_valid_candidate(similarity, valid, chosen):
    found = hardest_valid(torch.tensor([similarity]), torch.tensor([valid]).bool())
    assert found.tolist() == [chosen]


def test_noise_depends_on_seed_image_and_iteration_only():
    both = draw_noise(3, 7, [11, 12], (50, 10, 4))
    assert torch.equal(both[1], draw_noise(3, 7, [12], (50, 10, 4))[0])
    assert not torch.equal(both[0], both[1])
    assert both.min() >= -0.5 and both.max() < 0.5
    assert both.mean().abs() < 0.02 and both.std() == pytest.approx(12**-0.5, abs=0.01)
    for other in (draw_noise(3, 8, [11], (50, 10, 4)), draw_noise(4, 7, [11], (50, 10, 4))):
        assert not torch.equal(both[:1], other)


def test_the_closed_loop_settles_at_the_set_point():
    """Positives become less similar with the level, which settles where they meet the set point."""
    curriculum = Curriculum(feedback=Feedback(set_point=0.7, gain=0.5, period=2))
    levels = []
    for iteration in range(60):
        curriculum.step(iteration, 60)
        levels.append(curriculum.level)
        curriculum.measure(torch.full((3,), 0.95 - 0.5 * curriculum.level))
    assert levels[:2] == [0, 0] and levels[2] == levels[3] == pytest.approx(0.5 * 0.25)
    assert levels[-1] == pytest.approx(0.5, abs=1e-3)
    for _ in range(40):
        iteration += 1
        curriculum.step(iteration, 60)
        curriculum.measure(torch.full((3,), 0.2))
    assert curriculum.level == 0  # clamped
    before = curriculum.level
    curriculum.measured.zero_()
    curriculum.step(102, 60)  # no positive since the last change: it stays
    assert curriculum.level == before


@pytest.mark.parametrize("feedback", [None, Feedback(-0.3, 0.3, 3)])
def test_a_resumed_curriculum_continues_exactly(feedback):
    def run(curriculum, start, stop):
        found = []
        for iteration in range(start, stop):
            found.append(curriculum.step(iteration, 20))
            curriculum.measure(torch.sin(torch.arange(4.0) + iteration))
        return found

    whole = run(Curriculum(feedback=feedback), 0, 20)
    first, second = Curriculum(feedback=feedback), Curriculum(feedback=feedback)
    half = run(first, 0, 10)
    second.load_state_dict(first.state_dict())
    assert second.level == first.level and second.iteration == 9
    assert half + run(second, 10, 20) == whole
    assert len(set(whole)) > 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"center": (0.1,)},
        {"log_size": (-0.1, 1)},
        {"iou_floor": (0.8, 1.2)},
        {"feedback": Feedback(period=0)},
        {"feedback": Feedback(set_point=2)},
    ],
)
def test_errors_name_the_wrong_value(wrong):
    with pytest.raises(UserError, match=f"curriculum.{next(iter(wrong))}"):
        Curriculum(**wrong)
