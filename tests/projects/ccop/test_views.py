"""View geometry of CCOP: survival, matching, clamp, padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from region_pretrain.data.geometry import ViewGeometry, boxes_in_view
from region_pretrain.data.photometry import Photometry
from region_pretrain.errors import UserError
from region_pretrain.projects.ccop import CCOPViews
from region_pretrain.projects.ccop.views import visible_fraction

WHOLE = ViewGeometry(0, 0, 200, 100, (224, 224))
BOX = np.array([[50, 20, 150, 80]], np.float32)


def make_views(**kwargs) -> CCOPViews:
    return CCOPViews(**{"size": 224, "photometry": Photometry(), **kwargs})


def random_boxes(count: int, seed: int, width: int = 200, height: int = 100) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(1), corners.max(1) + 2], axis=1)
    return np.minimum(boxes, (width, height) * 2).astype(np.float32)


@pytest.mark.parametrize(("left", "fraction", "kept"), [(100, 0.5, 0), (80, 0.7, 1), (90, 0.6, 0)])
def test_survival_needs_more_than_the_visible_fraction(left, fraction, kept):
    crop = ViewGeometry(left, 0, 100, 100, (224, 224))
    assert visible_fraction(crop, BOX) == pytest.approx([fraction])
    survives = visible_fraction(crop, BOX) > make_views().min_visible
    indices, _ = make_views().match([crop, WHOLE], BOX, survives)
    assert len(indices) == kept


@pytest.mark.parametrize(
    ("flip", "mapped", "clamped"),
    [
        (False, (0, 44.8, 156.8, 179.2), (0, 44.8, 156.8, 179.2)),
        (True, (67.2, 44.8, 224, 179.2), (67.2, 44.8, 223, 179.2)),
    ],
)
def test_mapping_flip_and_clamp(flip, mapped, clamped):
    crop = ViewGeometry(80, 0, 100, 100, (224, 224), flip)
    np.testing.assert_allclose(boxes_in_view(crop, BOX)[0], mapped, atol=1e-4)
    _, (seen, _) = make_views().match([crop, WHOLE], BOX, np.array([True]))
    np.testing.assert_allclose(seen[0], clamped, atol=1e-4)


@pytest.mark.parametrize(("side", "kept"), [(12, 0), (12.1, 1)])
def test_area_filter_at_view_scale(side, kept):
    whole = ViewGeometry(0, 0, 224, 224, (224, 224))
    box = np.array([[20, 30, 20 + side, 30 + side]], np.float32)
    indices, _ = make_views().match([whole, whole], box, np.array([True]))
    assert len(indices) == kept
    twice = ViewGeometry(0, 0, 112, 112, (224, 224))  # large enough in one view is not enough
    indices, _ = make_views().match([twice, whole], box, np.array([True]))
    assert len(indices) == kept


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_both_views_have_the_regions_that_survive_in_both(count, seed):
    boxes = random_boxes(count, seed)
    query, key = make_views()(200, 100, boxes, np.random.default_rng(seed))
    assert query.boxes.shape == key.boxes.shape == (50, 4)
    assert (query.valid == key.valid).all() and (query.region_ids == key.region_ids).all()
    expected = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(float)):
        good = True
        for g in (query.geometry, key.geometry):
            w = min(x2, g.left + g.width) - max(x1, g.left)
            h = min(y2, g.top + g.height) - max(y1, g.top)
            inside = max(w, 0) * max(h, 0)
            good &= inside / ((x2 - x1) * (y2 - y1)) > 0.6
            good &= inside * (224 / g.width) * (224 / g.height) > 144
        if good:
            expected.append(i)
    found = query.region_ids[query.valid]
    assert len(set(found)) == len(found) == min(50, len(expected))
    assert set(found) <= set(expected)
    for view in (query, key):
        shown = np.clip(boxes_in_view(view.geometry, boxes[found]), 0, 223)
        np.testing.assert_allclose(view.boxes[view.valid], shown, atol=1e-4)
        assert not view.boxes[~view.valid].any() and not view.region_ids[~view.valid].any()


def test_too_many_regions_are_subsampled_at_random():
    boxes = np.tile(np.array([[5, 5, 195, 95]], np.float32), (20, 1))
    views = make_views(num_regions=4, crop_areas=[(0.95, 1.0)] * 2)
    seen = {
        tuple(views(200, 100, boxes, np.random.default_rng(s))[0].region_ids) for s in range(20)
    }
    assert len(seen) > 10 and {i for ids in seen for i in ids} == set(range(20))
    assert all(list(ids) == sorted(set(ids)) for ids in seen)


def test_crops_are_redrawn_until_a_region_survives(monkeypatch):
    boxes = np.array([[60, 60, 110, 110]], np.float32)
    views, rng = make_views(), np.random.default_rng(0)

    def survives():
        geometry, flags = views._draw_crop(400, 400, boxes, (0.05, 0.2), rng)
        assert (flags == (visible_fraction(geometry, boxes) > 0.6)).all()
        return flags.any()

    ten = np.mean([survives() for _ in range(300)])
    monkeypatch.setattr("region_pretrain.projects.ccop.views._ATTEMPTS", 1)
    once = np.mean([survives() for _ in range(1500)])
    assert 0.03 < once < 0.3
    assert ten == pytest.approx(1 - (1 - once) ** 10, abs=0.1)


def test_either_crop_may_be_the_query():
    views = make_views(crop_areas=[(1.0, 1.0), (0.1, 0.2)])
    none = np.zeros((0, 4), np.float32)
    wide = [
        views(200, 200, none, np.random.default_rng(s))[0].geometry.width == 200 for s in range(200)
    ]
    assert np.mean(wide) == pytest.approx(0.5, abs=0.12)


def test_an_image_without_regions_has_no_valid_slot():
    for view in make_views()(200, 100, np.zeros((0, 4), np.float32), np.random.default_rng(0)):
        assert not view.valid.any() and view.geometry.size == (224, 224)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_areas": [(0.1, 1.0)]},
        {"crop_areas": [(0.1, 1.0), (0.5, 0.2)]},
        {"min_visible": 1.0},
        {"num_regions": 0},
    ],
)
def test_errors_name_the_wrong_value(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        make_views(**wrong)
