"""The contrast of points against a slow restatement and known values."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from region_pretrain.errors import UserError
from region_pretrain.projects.point_region_contrast import PointContrast
from region_pretrain.projects.point_region_contrast import contrast as contrast_module
from region_pretrain.projects.point_region_contrast.contrast import Points


def points(vectors, ids, valid=None) -> Points:
    ids = torch.as_tensor(ids)
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return Points(torch.as_tensor(vectors, dtype=torch.float32), ids, valid)


def mean(contrast: PointContrast, query: Points, key: Points) -> float:
    total, count, _ = contrast(query, key)
    return float(total) / count


def basis(ids, dim: int = 64) -> torch.Tensor:
    """A unit vector for each image and id."""
    ids = torch.as_tensor(ids)
    flat = torch.arange(len(ids))[:, None] * 8 + ids
    return F.one_hot(flat, dim).float()


def random_points(seed: int = 0, images: int = 3) -> tuple[Points, Points]:
    rng = np.random.default_rng(seed)
    both = []
    for _ in range(2):
        ids = rng.integers(1, 4, (images, 6))
        valid = rng.random((images, 6)) < 0.8
        both.append(points(rng.normal(size=(images, 6, 5)), ids, valid))
    return both[0], both[1]


def slowly(query, key, in_image=True, others=True, log="outside", same_view=False, tau=0.2):
    """The equation point by point; ``others`` are of the same batch."""
    f, g = (F.normalize(p.vectors.detach().double(), dim=2) for p in (query, key))
    everything = []  # (vector, image, id, which point of the query view)
    for b, s in itertools.product(*map(range, key.ids.shape)):
        if key.valid[b, s]:
            everything.append((g[b, s], b, int(key.ids[b, s]), None))
        if same_view and query.valid[b, s]:
            everything.append((f[b, s], b, int(query.ids[b, s]), (b, s)))
    losses = []
    for b, s in itertools.product(*map(range, query.ids.shape)):
        if not query.valid[b, s]:
            continue
        shares, found = [], []
        for vector, image, id_, which in everything:
            same = image == b and id_ == int(query.ids[b, s])
            if which == (b, s) or (image == b and not same and not in_image):
                continue
            if image != b and not others:
                continue
            shares.append(math.exp(float(f[b, s] @ vector) / tau))
            if same:
                found.append(shares[-1])
        if found:
            total = sum(shares)
            if log == "inside":
                losses.append(-math.log(sum(found) / total))
            else:
                losses.append(-sum(math.log(x / total) for x in found) / len(found))
    return sum(losses), len(losses)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("same_view", [False, True])
@pytest.mark.parametrize("log", ["outside", "inside"])
@pytest.mark.parametrize(
    ("in_image", "others"), [(True, "local"), (False, "local"), (True, "none")]
)
def test_against_the_slow_restatement(monkeypatch, chunk, same_view, log, in_image, others):
    monkeypatch.setattr(contrast_module, "entries_at_once", lambda device: chunk)
    query, key = random_points()
    query.vectors.requires_grad_()
    contrast = PointContrast(in_image=in_image, others=others, log=log, same_view=same_view)
    total, count, _ = contrast(query, key)
    expected = slowly(query, key, in_image, others == "local", log, same_view)
    assert count == expected[1] > 5 and total.item() == pytest.approx(expected[0], rel=1e-5)
    total.backward()
    step, (b, s) = 1e-3, (1, 2)
    moved = query.vectors.detach().clone()
    slopes = []
    for sign in (1, -1):
        nudged = moved.clone()
        nudged[b, s, 0] += sign * step
        changed = query._replace(vectors=nudged)
        slopes.append(slowly(changed, key, in_image, others == "local", log, same_view)[0])
    slope = (slopes[0] - slopes[1]) / (2 * step)
    assert float(query.vectors.grad[b, s, 0]) == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_values_of_the_papers_form():
    ids = [[1, 1, 2, 2]]
    alone = PointContrast(others="none")
    perfect = points(basis(ids), ids)
    assert mean(alone, perfect, perfect) == pytest.approx(0.69986, abs=1e-5)
    equal = points(torch.ones(1, 4, 8), ids)
    assert mean(alone, equal, equal) == pytest.approx(math.log(4), abs=1e-5)


@pytest.mark.parametrize(
    ("batch", "equal", "perfect"), [(2, 11.8375, 9.8312), (32, 19.8014, 10.3692)]
)
def test_values_of_the_released_form(batch, equal, perfect):
    """One region per image, 32 points in both views, other images as negatives."""
    ids = torch.ones(batch, 16, dtype=torch.int64)  # the released loss has a factor 0.2 / 0.07
    released = PointContrast(in_image=False, others="local", same_view=True)
    alike = points(torch.ones(batch, 16, 4), ids)
    apart = points(torch.eye(batch)[:, None].expand(-1, 16, -1), ids)
    assert 0.2 / 0.07 * mean(released, alike, alike) == pytest.approx(equal, abs=1e-4)
    assert 0.2 / 0.07 * mean(released, apart, apart) == pytest.approx(perfect, abs=1e-4)


def test_pooled_points_are_regions():
    query, key = random_points(1)
    ids = torch.tensor([[1, 1, 1, 2, 2, 2]]).expand(3, -1)
    query, key = (p._replace(ids=ids, valid=torch.ones_like(p.valid)) for p in (query, key))
    pooled = [points(p.vectors.view(3, 2, 3, 5).mean(dim=2), ids[:, ::3]) for p in (query, key)]
    found = mean(PointContrast(pool=3), query, key)
    assert found == pytest.approx(np.divide(*slowly(*pooled)), rel=1e-5)
    with pytest.raises(UserError, match="pool=4 does not divide the 6 points"):
        PointContrast(pool=4)(query, key)
    with pytest.raises(UserError, match="averages points with different ids"):
        PointContrast(pool=6)(query, key)


def test_a_queue_contains_other_images_points():
    query, key = random_points(2)
    contrast = PointContrast(others="queue", queue_length=40, dim=5).train()
    f, bank = F.normalize(query.vectors, dim=2), contrast.queue.keys.clone()
    total, count, _ = contrast(query, key)
    expected = 0.0
    g = F.normalize(key.vectors, dim=2)
    for b, s in itertools.product(range(3), range(6)):
        same = (key.ids[b] == query.ids[b, s]) & key.valid[b]
        if query.valid[b, s] and same.any():
            rows = torch.cat([g[b][key.valid[b]], bank]) @ f[b, s] / 0.2
            expected += float(rows.logsumexp(0) - (g[b][same] @ f[b, s] / 0.2).mean())
    assert float(total) == pytest.approx(expected, rel=1e-5) and count > 5
    points_in = int(key.valid.sum())
    assert int(contrast.queue.pointer) == points_in
    torch.testing.assert_close(contrast.queue.keys[:points_in], g[key.valid])


def test_no_positive_is_a_connected_zero():
    query, key = random_points()
    query.vectors.requires_grad_()
    key = key._replace(ids=key.ids + 10)
    for nothing in (key, key._replace(valid=torch.zeros_like(key.valid))):
        total, count, similarity = PointContrast(in_image=False)(query, nothing)
        assert total == 0 and count == 0 and similarity == 0
        total.backward()
        assert (query.vectors.grad == 0).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"others": "cue"}, "contrast.others='cue' must be one of none, local, gathered, queue"),
        ({"log": "both"}, "contrast.log='both'"),
        ({"temperature": 0.0}, "contrast.temperature=0.0 must be positive"),
        ({"in_image": False, "others": "none"}, "leaves no negatives"),
    ],
)
def test_errors_name_the_wrong_value(settings, named):
    with pytest.raises(UserError, match=named):
        PointContrast(**settings)
