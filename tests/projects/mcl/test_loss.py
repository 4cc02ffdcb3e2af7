"""MCL's loss: reference values, and the pairing of levels."""

import math

import pytest
import torch
import torch.nn.functional as F

from region_pretrain.errors import UserError
from region_pretrain.projects.mcl.loss import image_keys, level_contrast, target_levels

WEIGHTS = (1 / 2, 1 / 4, 1 / 8, 1 / 8)


def total(queries: torch.Tensor, keys: torch.Tensor, tau: float = 1.0):
    """Weighted losses of the levels, one direction; query i belongs to key i."""
    positives = torch.arange(len(queries))
    loss = level_contrast(queries, {0: keys}, positives, [0], tau).loss.item()
    return [w * loss for w in WEIGHTS]


@pytest.mark.parametrize(("images", "value"), [(4096, 33.271), (128, 19.408)])
def test_uniform_logits(images, value):
    queries = torch.tensor([[0.0, 3.0]]).expand(128, 2)
    keys = torch.tensor([[1.0, 0.0]]).expand(images, 2)
    parts = total(queries, keys)
    assert 2 * sum(parts) == pytest.approx(value, abs=1e-3)
    assert 2 * sum(parts) == pytest.approx(4 * math.log(images), rel=1e-5)
    if images == 4096:
        assert parts == pytest.approx([8.318, 4.159, 2.079, 2.079], abs=1e-3)


def test_own_key_found_and_all_others_orthogonal():
    keys = torch.zeros(4096, 129)
    keys[:128, :128] = torch.eye(128)
    keys[128:, 128] = 1.0
    parts = total(5 * keys[:128], keys)  # queries are normalised
    assert 2 * sum(parts) == pytest.approx(29.273, abs=1e-3)
    cross_entropy = math.log(math.e + 4095) - 1
    assert cross_entropy == pytest.approx(7.3182, abs=1e-4)
    for tau in (0.2, 0.5):
        here = math.log(math.exp(1 / tau) + 4095) - 1 / tau
        assert 2 * sum(total(keys[:128], keys, tau)) == pytest.approx(4 * tau * here, rel=1e-4)


def test_keys_are_the_images_tiles_averaged():
    vectors = torch.randn(6, 8)
    images = torch.tensor([2, 0, 1, 0, 2, 0])
    units = F.normalize(vectors, dim=1)
    slow = [units[1] + units[3] + units[5], units[2], units[0] + units[4]]
    slow = torch.stack([v / v.norm() for v in slow])
    torch.testing.assert_close(image_keys(vectors, images, 3), slow)
    alone = image_keys(vectors, torch.arange(6), 6)
    torch.testing.assert_close(alone, units)


def test_pairings_of_the_figure():
    assert target_levels("top", 4) == [[0], [0], [0], [0]]
    assert target_levels("same", 4) == [[0], [1], [2], [3]]
    assert target_levels("adjacent", 4) == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert target_levels("all", 3) == [[0, 1, 2]] * 3
    assert target_levels([[0], [1, 0], [2]], 3) == [[0], [0, 1], [2]]


@pytest.mark.parametrize("pairing", ["bottom", [[0], [1]], [[0], [1], [3]], [[0], [], [1]]])
def test_unknown_pairings_are_reported(pairing):
    with pytest.raises(UserError, match="model.pairing"):
        target_levels(pairing, 3)


def test_several_target_levels_are_averaged():
    queries = torch.randn(5, 8)
    keys = {j: F.normalize(torch.randn(5, 8), dim=1) for j in range(3)}
    positives = torch.tensor([0, 0, 3, 4, 1])
    both = level_contrast(queries, keys, positives, [0, 2], 0.5)
    alone = [level_contrast(queries, keys, positives, [j], 0.5) for j in (0, 2)]
    for field in ("loss", "positive", "negative"):
        mean = sum(getattr(a, field) for a in alone) / 2
        torch.testing.assert_close(getattr(both, field), mean)
