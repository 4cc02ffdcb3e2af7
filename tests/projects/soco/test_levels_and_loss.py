"""Level assignment, correspondence and loss of SoCo."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from region_pretrain.modeling.losses import embedding_std, matched_cosine_loss, matches
from region_pretrain.modeling.regions import UNASSIGNED, assign_levels

SCALES = (48, 96, 192, 224)


@pytest.mark.parametrize(
    ("side", "level"),
    [(48, 0), (49, 1), (64, 1), (96, 1), (97, 2), (192, 2), (193, 3), (224, 3), (225, UNASSIGNED)]
    + [(224 * (1 + 5e-6), 3)],  # rounding,
)
def test_levels_of_squares(side, level):
    box = torch.tensor([[7.0, 5.0, 7.0 + side, 5.0 + side]])
    assert assign_levels(box, SCALES).tolist() == [level]


def test_levels_of_boxes_in_views():
    boxes = torch.tensor(
        [
            [44.8, 28, 134.4, 84],  # the reference box in the whole image at 224: P3
            [22.4, 22.4, 134.4, 97.0667],  # in a 400x300 crop at 224: P3
            [11.2, 11.2, 67.2, 48.5333],  # the crop at 112: P2
            [19.2, 19.2, 115.2, 83.2],  # the crop at 192: P3
            [0, 0, 224, 224],  # the whole view: P5
            [0, 0, 112, 112],  # the whole small view: P4
        ]
    )
    assert assign_levels(boxes, SCALES).tolist() == [1, 1, 0, 1, 3, 2]


def test_levels_agree_with_integer_pixels_away_from_the_bounds():
    """The released code truncates inclusive corners to integers; only ties can differ."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 224, (3000, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(1) > 4]
    ours = assign_levels(torch.from_numpy(boxes).float(), SCALES).numpy()
    pixel = 224 / 500
    differ = 0
    for box, level in zip(boxes, ours, strict=True):
        x1, y1, x2, y2 = int(box[0]), int(box[1]), int(box[2] - pixel), int(box[3] - pixel)
        scale = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
        theirs = next((i for i, bound in enumerate(SCALES) if scale <= bound), UNASSIGNED)
        if theirs != level:
            differ += 1
            exact = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            assert min(abs(exact - bound) for bound in SCALES) < 0.02 * exact + 3
    assert differ < 0.03 * len(boxes)


def test_correspondence_of_four_distinct_and_of_one_padded_region():
    valid = torch.ones(1, 4, dtype=torch.bool)
    distinct = torch.tensor([[3, 8, 1, 5]])
    assert matches(distinct, distinct[:, [2, 0, 3, 1]], valid, valid).sum() == 4
    one = torch.full((1, 4), 7)
    assert matches(one, one, valid, valid).sum() == 16
    unassigned = torch.zeros(1, 4, dtype=torch.bool)
    assert matches(one, one, unassigned, valid).sum() == 0
    assert matches(one, one, valid, unassigned).sum() == 0


def test_loss_of_identical_and_of_orthogonal_vectors():
    same = F.normalize(torch.randn(3, 1, 16), dim=-1).expand(3, 4, 16)
    match = torch.ones(3, 4, 4, dtype=torch.bool)
    term = matched_cosine_loss(same, same, match).item()
    assert term == pytest.approx(-2, abs=1e-5)
    for pairs, total in ((2, -8), (3, -12), (1, -4)):  # FPN, star, C4
        assert 2 * pairs * term == pytest.approx(total, abs=1e-4)
    axes = torch.eye(8)
    orthogonal = matched_cosine_loss(axes[None, :4], axes[None, 4:], torch.ones(1, 4, 4).bool())
    assert orthogonal.item() == 0


def test_loss_against_a_slow_restatement():
    rng = np.random.default_rng(0)
    p = rng.standard_normal((5, 4, 8))
    z = rng.standard_normal((5, 6, 8))
    p /= np.linalg.norm(p, axis=-1, keepdims=True)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    match = rng.random((5, 4, 6)) < 0.3
    match[2] = False
    slow = 0.0
    for b in range(5):
        total, count = 0.0, 0
        for i in range(4):
            for j in range(6):
                if match[b, i, j]:
                    total += float(np.dot(p[b, i], z[b, j]))
                    count += 1
        slow += -2 * total / (count + 1e-6) / 5
    fast = matched_cosine_loss(torch.from_numpy(p), torch.from_numpy(z), torch.from_numpy(match))
    assert fast.item() == pytest.approx(slow, abs=1e-9)


def test_loss_is_byols_squared_error_up_to_a_constant():
    p, z = (F.normalize(torch.randn(6, 1, 32, dtype=torch.float64), dim=-1) for _ in range(2))
    byol = (p - z).square().sum(-1).mean()  # 2 - 2 cos
    ours = matched_cosine_loss(p, z, torch.ones(6, 1, 1).bool())
    assert (byol - ours).item() == pytest.approx(2, abs=1e-5)


def test_mixed_precision_leaves_the_loss_in_single_precision():
    p, z = (F.normalize(torch.randn(6, 4, 32), dim=-1) for _ in range(2))
    match = torch.rand(6, 4, 4) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        mixed = matched_cosine_loss(p, z, match)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, matched_cosine_loss(p, z, match), rtol=0, atol=0)


def test_the_target_receives_no_gradient():
    p = torch.randn(2, 4, 8, requires_grad=True)
    z = torch.randn(2, 4, 8, requires_grad=True)
    matched_cosine_loss(p, z, torch.ones(2, 4, 4).bool()).backward()
    assert z.grad is None and p.grad.abs().sum() > 0


def test_embedding_std_distinguishes_spread_from_collapse():
    sphere = F.normalize(torch.randn(4000, 64), dim=1)
    assert embedding_std(sphere).item() == pytest.approx(1, abs=0.02)
    assert embedding_std(sphere[:1].expand(100, 64)).item() == pytest.approx(0, abs=1e-6)
