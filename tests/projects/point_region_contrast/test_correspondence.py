"""Overlap of crops and matching of their cells."""

import numpy as np
import pytest

from region_pretrain.data.geometry import ViewGeometry
from region_pretrain.errors import UserError
from region_pretrain.projects.point_region_contrast.correspondence import (
    crop_overlap,
    match_cells,
    view_window,
)

WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("second", "ratio"),
    [
        ((50, 0, 150, 100), 0.5),
        ((0, 0, 50, 90), 0.45),
        ((0, 0, 50, 100), 0.5),
        ((200, 0, 300, 9), 0),
    ],
)
def test_overlap_is_of_the_larger_area(second, ratio):
    first = np.array([0, 0, 100, 100], np.float32)
    assert crop_overlap(first, np.array(second, np.float32)) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("second", "cells", "count"),
    [
        (WHOLE, 4, 16),
        (WHOLE, 7, 49),
        (WHOLE, 56, 3136),
        ((1, 0, 0, 1), 4, 16),
        ((1, 0, 0, 1), 56, 3136),
        ((0.5, 0, 1.5, 1), 4, 8),
        ((0.5, 0, 1.5, 1), 56, 1568),
        ((0, 0, 0.5, 0.5), 56, 3136),
    ],
)
def test_numbers_of_matches(second, cells, count):
    found = match_cells(WHOLE, second, cells)
    assert len(found) == count and len(np.unique(found, axis=0)) == count


def test_which_cells_match():
    same = match_cells(WHOLE, WHOLE, 4)
    assert (same[:, 0] == same[:, 1]).all() and same[:, 0].tolist() == list(range(16))
    assert match_cells(WHOLE, (1, 0, 0, 1), 4)[:4].tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]
    mirrored = match_cells(WHOLE, (1, 0, 0, 1), 56)
    row, column = mirrored[:, 0] // 56, mirrored[:, 0] % 56
    assert (mirrored[:, 1] == 56 * row + 55 - column).all()
    assert match_cells(WHOLE, (0.5, 0, 1.5, 1), 4)[:2].tolist() == [[2, 0], [3, 1]]
    assert len(match_cells((0, 0, 0.5, 0.5), (0.6, 0.6, 1, 1), 56)) == 0


def test_matches_against_all_pairs():
    first, second = (13.0, 70.0, 180.0, 10.0 + 170), (200.0, 40.0, 30.0, 150.0)  # one is mirrored
    cells, expected = 9, []
    steps = [((w[2] - w[0]) / cells, (w[3] - w[1]) / cells) for w in (first, second)]
    for i in range(cells**2):
        for j in range(cells**2):
            (a, b), (c, d) = (
                (w[0] + (k % cells + 0.5) * s[0], w[1] + (k // cells + 0.5) * s[1])
                for w, s, k in ((first, steps[0], i), (second, steps[1], j))
            )
            if np.hypot(a - c, b - d) / max(np.hypot(*s) for s in steps) < 0.5:
                expected.append([i, j])
    assert sorted(match_cells(first, second, cells).tolist()) == expected and len(expected) > 30


def test_window_of_a_mirrored_view():
    geometry = ViewGeometry(10, 20, 30, 40, (64, 64), flip=True)
    assert view_window(geometry) == (40, 20, 10, 60)
    corners = geometry.original_points(np.array([[0.0, 0.0], [64.0, 64.0]]))
    assert corners.tolist() == [[40, 20], [10, 60]]


def test_query_and_partner_overlap_and_the_key_is_independent(make_views):
    views = make_views(max_draws=101)
    none = np.zeros((0, 4), np.float32)
    near, far = [], []
    for seed in range(200):
        samples = views(300, 200, none, np.random.default_rng(seed))
        query, key, partner = (sample.geometry.crop_box for sample in samples)
        near.append(crop_overlap(query, partner))
        far.append(crop_overlap(query, key))
    assert min(near) >= 0.5 and np.mean(np.array(far) < 0.5) > 0.3
    once = make_views(max_draws=1)
    first = [once(300, 200, none, np.random.default_rng(s)) for s in range(50)]
    assert min(crop_overlap(a.geometry.crop_box, c.geometry.crop_box) for a, _, c in first) < 0.5


def test_a_sample_depends_on_its_generator_only(make_views):
    for kind in ("grid", "kmeans"):
        views = make_views(kind=kind)
        image = np.random.default_rng(5).integers(0, 256, (200, 300, 3), dtype=np.uint8)
        both = []
        for _ in range(2):
            rng = np.random.default_rng(1)
            samples = views(300, 200, np.zeros((0, 4), np.float32), rng)
            both.append(views.complete(samples, image, (300, 200), rng))
        for a, b in zip(*both, strict=True):
            assert a.geometry == b.geometry and a.valid.any()
            assert (a.boxes == b.boxes).all() and (a.region_ids == b.region_ids).all()


def test_more_regions_than_slots_and_images_without_any(make_views):
    few = make_views(num_regions=2, options={"n": 8})
    seen = set()
    for seed in range(30):
        query, key, _ = few(90, 90, np.zeros((0, 4), np.float32), np.random.default_rng(seed))
        assert (query.valid[:6] == key.valid).all()
        ids = np.unique(key.region_ids[key.valid])
        assert len(ids) <= 2 and (query.region_ids[:6] == key.region_ids).all()
        seen.update(ids.tolist())
    assert len(seen) > 20  # not always the first two
    boxes = make_views(kind="boxes")
    query, key, partner = boxes(90, 90, np.zeros((0, 4), np.float32), np.random.default_rng(0))
    assert not key.valid.any() and not query.valid[:24].any()
    assert partner.valid.any()  # the affinities need no regions
    box = np.array([[10, 10, 80, 80]], np.float32)
    query, key, _ = boxes(90, 90, box, np.random.default_rng(0))
    assert set(key.region_ids[key.valid]) == {1} and key.valid.sum() == 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"positives": "point"}, "positives='point' must be one of region, location"),
        ({"crop_area": (0.5, 0.2)}, "crop_area"),
        ({"points": 0}, "points=0 must be at least 1"),
        ({"pairs": -1}, "pairs=-1 must be at least 0"),
        ({"min_overlap": 1.5}, r"min_overlap=1.5 must be in \[0, 1\]"),
    ],
)
def test_errors_name_the_wrong_value(make_views, settings, named):
    with pytest.raises(UserError, match=named):
        make_views(**settings)
