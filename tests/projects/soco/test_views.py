"""SoCo's views and boxes, compared with reference values of the method."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from region_pretrain.data.geometry import ViewGeometry, boxes_in_view, overlaps
from region_pretrain.data.photometry import Photometry, PhotometryLayout
from region_pretrain.errors import UserError
from region_pretrain.projects.soco import SoCoViews, jitter_boxes
from region_pretrain.projects.soco.views import pair_groups

# Inclusive corners (100, 50, 299, 149) in the reference; half-open, the far corner is one more.
BOX = np.array([[100, 50, 300, 150]], np.float32)


def make_views(sources=("crop", "crop"), sizes=(224, 224, 112), **kwargs) -> SoCoViews:
    return SoCoViews(list(sizes), list(sources), Photometry(), Photometry(), **kwargs)


@pytest.mark.parametrize(
    ("geometry", "normalised"),
    [
        (ViewGeometry(0, 0, 500, 400, (224, 224)), (0.2, 0.125, 0.598, 0.3725)),
        (ViewGeometry(60, 20, 400, 300, (224, 224)), (0.1, 0.1, 0.5975, 0.43)),
        (ViewGeometry(60, 20, 400, 300, (112, 112)), (0.1, 0.1, 0.5975, 0.43)),
        (ViewGeometry(60, 20, 400, 300, (192, 192)), (0.1, 0.1, 0.5975, 0.43)),
    ],
)
def test_reference_boxes_in_view_coordinates(geometry, normalised):
    box = boxes_in_view(geometry, BOX)[0]
    # Released code normalises inclusive corners: its far corner is one original pixel short.
    pixel = np.array([0, 0, geometry.size[1] / geometry.width, geometry.size[0] / geometry.height])
    size = np.array([geometry.size[1], geometry.size[0]] * 2)
    np.testing.assert_allclose((box - pixel) / size, normalised, atol=1e-6)


def test_flip_of_a_normalised_box():
    flipped = boxes_in_view(
        ViewGeometry(0, 0, 10, 10, (1000, 1000), flip=True),
        np.array([[1, 2, 5, 6]], np.float32),
    )
    np.testing.assert_allclose(flipped / 1000, [[0.5, 0.2, 0.9, 0.6]], atol=1e-6)


def test_jitter_of_the_reference_box():
    jittered = jitter_boxes(BOX, np.array([[0.1, -0.1, 0.1, -0.1]]))
    # Inclusive (120, 40, 339, 129).
    np.testing.assert_allclose(jittered, [[120, 40, 340, 130]], atol=1e-4)


def test_groups_of_the_variants():
    assert pair_groups(["crop"]) == [0]  # C4
    assert pair_groups(["crop", "crop"]) == [0, 1]  # FPN
    assert pair_groups(["crop", 0]) == [0, 0]  # the third view is the second, smaller
    assert pair_groups(["crop", "crop", 0]) == [0, 1, 0]  # star


@pytest.mark.parametrize("sources", [["crop", -1], [0, "crop"], ["crop", 1], ["whole"]])
def test_unknown_sources_are_reported(sources):
    with pytest.raises(UserError, match="views.sources"):
        pair_groups(sources)


def sample(views: SoCoViews, boxes: np.ndarray, seed: int = 0, width: int = 500, height: int = 400):
    return views(width, height, boxes, np.random.default_rng(seed))


def random_boxes(count: int, seed: int, width: int = 500, height: int = 400) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(1), corners.max(1) + 2], axis=1)
    return np.minimum(boxes, (width, height) * 2).astype(np.float32)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_matched_slots_show_the_same_region(count, seed):
    boxes = random_boxes(count, seed)
    views = make_views(jitter_prob=0.0)
    first, *others = sample(views, boxes, seed)
    assert first.boxes.shape == (8, 4) and len(others) == 2
    for group, view in enumerate(others):
        ids = first.region_ids[4 * group : 4 * group + 4]
        assert set(ids) == set(view.region_ids)
        assert view.boxes.shape == (4, 4) and view.valid.all()
        if not count or not overlaps(view.geometry.crop_box, boxes).any():
            continue  # the complete views match; tested separately
        for slot, region in enumerate(view.region_ids):
            shown = boxes_in_view(view.geometry, boxes[region : region + 1])[0]
            assert (shown[2:] > shown[:2]).all()
            np.testing.assert_allclose(view.boxes[slot], shown, atol=1e-4)
        for slot, region in zip(range(4 * group, 4 * group + 4), ids, strict=True):
            whole = boxes_in_view(first.geometry, boxes[region : region + 1])[0]
            np.testing.assert_allclose(first.boxes[slot], whole, atol=1e-4)


def test_without_regions_the_whole_image_is_the_region():
    first, second, third = sample(make_views(jitter_prob=0.0), np.zeros((0, 4), np.float32))
    np.testing.assert_allclose(first.boxes, [[0, 0, 224, 224]] * 8, atol=1e-4)
    np.testing.assert_allclose(second.boxes, [[0, 0, 224, 224]] * 4, atol=1e-4)
    np.testing.assert_allclose(third.boxes, [[0, 0, 112, 112]] * 4, atol=1e-4)
    match = first.region_ids[:4, None] == second.region_ids[None]
    assert match.sum() == 16


def test_a_crop_without_regions_matches_as_a_complete_view():
    boxes = np.array([[0, 0, 1.5, 1.5]], np.float32)  # in a corner that few crops contain
    missed = 0
    for seed in range(200):
        first, second, _ = sample(make_views(jitter_prob=0.0), boxes, seed)
        if second.geometry.left >= 2 or second.geometry.top >= 2:
            missed += 1
            np.testing.assert_allclose(second.boxes, [[0, 0, 224, 224]] * 4, atol=1e-4)
            np.testing.assert_allclose(first.boxes[:4], [[0, 0, 224, 224]] * 4, atol=1e-4)
    assert missed > 100


@pytest.mark.parametrize(("shown", "attempts"), [(2, 1), (1, 2), (0, 5)])
def test_crops_are_drawn_again_for_half_of_the_slots_then_a_quarter(shown, attempts, monkeypatch):
    boxes = np.array([[0, 0, 100, 400], [0, 0, 300, 400]], np.float32)
    left, drawn = (50, 200, 400)[2 - shown], []

    def crop(width, height, size, rng, area):
        drawn.append(area)
        return ViewGeometry(left, 0, width - left, height, size)

    monkeypatch.setattr("region_pretrain.projects.soco.views.random_resized_crop", crop)
    _, second, _ = sample(make_views(), boxes)
    assert drawn == [(0.5, 1.0)] * 2 * attempts  # two views per attempt
    assert len(set(second.region_ids)) == max(shown, 1)


def test_the_first_view_has_colours_of_its_own():
    first, other = Photometry(blur_prob=1.0), Photometry(solarize_prob=0.2)
    sources = ["crop", "crop", 0]
    for prob in (0.0, 1.0):
        views = SoCoViews([224, 224, 192, 112], sources, first, other, cutout_prob=prob)
        samples = sample(views, random_boxes(6, 2))
        found = [s.photometry for s in samples]
        assert found[0] == first
        assert [p.photometry if prob else p for p in found[1:]] == [other] * 3


def test_four_of_many_are_distinct_and_drawn_separately_for_each_pair():
    boxes = np.tile([[200, 150, 300, 250]], (50, 1)).astype(np.float32)
    same = 0
    for seed in range(50):
        first, second, third = sample(make_views(), boxes, seed)
        assert len(set(second.region_ids)) == len(set(third.region_ids)) == 4
        same += set(second.region_ids) == set(third.region_ids)
    assert same < 5


def test_padding_repeats_common_regions_at_random():
    boxes = np.array([[200, 150, 300, 250], [190, 140, 290, 240]], np.float32)
    repeated = []
    for seed in range(400):
        first, second, _ = sample(make_views(), boxes, seed)
        assert sorted(set(second.region_ids)) == [0, 1] == sorted(set(first.region_ids[:4]))
        repeated.append([first.region_ids[2:4], second.region_ids[2:4]])
    counts = np.reshape(repeated, (400, 4))
    np.testing.assert_allclose(counts.mean(axis=0), 0.5, atol=0.1)
    correlations = np.corrcoef(counts.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 0.2  # drawn separately for each slot and view


def test_views_of_one_crop_share_regions():
    boxes = random_boxes(30, 1)
    first, second, third, fourth = sample(
        make_views(["crop", "crop", 0], (224, 224, 192, 112)), boxes
    )
    assert len(first.boxes) == 8
    a, b = second.geometry, fourth.geometry
    assert (a.left, a.top, a.width, a.height) == (b.left, b.top, b.width, b.height)
    assert set(second.region_ids) == set(fourth.region_ids)
    assert third.geometry.size == (192, 192) and b.size == (112, 112)


def test_jitter_changes_half_of_the_first_views_boxes_only():
    boxes = random_boxes(4, 3)
    moved = []
    for seed in range(300):
        first, second, _ = sample(make_views(), boxes, seed)
        for slot, region in enumerate(first.region_ids[:4]):
            whole = boxes_in_view(first.geometry, boxes[region : region + 1])[0]
            moved.append(not np.allclose(first.boxes[slot], whole, atol=1e-3))
        for slot, region in enumerate(second.region_ids):
            shown = boxes_in_view(second.geometry, boxes[region : region + 1])[0]
            np.testing.assert_allclose(second.boxes[slot], shown, atol=1e-3)
    assert np.mean(moved) == pytest.approx(0.5, abs=0.05)


def test_jitter_is_uniform_in_a_tenth_of_the_box():
    boxes = np.array([[200, 150, 300, 230]], np.float32)  # far from the borders
    changes = []
    for seed in range(500):
        first, *_ = sample(make_views(jitter_prob=1.0), boxes, seed)
        (x0, y0), (x1, y1) = boxes_in_view(first.geometry, boxes)[0].reshape(2, 2)
        corner, far = first.boxes[0].reshape(2, 2)
        size, scale = far - corner, np.array([x1 - x0, y1 - y0])
        shift = ((x0 if not first.geometry.flip else x1), y0)
        moved = (far[0] if first.geometry.flip else corner[0]), corner[1]
        sign = np.array([-1 if first.geometry.flip else 1, 1])
        changes.append([*(sign * (np.array(moved) - shift) / scale), *(size / scale - 1)])
    changes = np.array(changes)
    assert np.abs(changes).max() <= 0.1 + 1e-4
    np.testing.assert_allclose(changes.min(axis=0), -0.1, atol=0.003)
    np.testing.assert_allclose(changes.max(axis=0), 0.1, atol=0.003)
    np.testing.assert_allclose(changes.mean(axis=0), 0, atol=0.008)


def test_a_minimum_visible_side_drops_slivers():
    boxes = random_boxes(60, 5)
    for seed in range(30):
        for view in sample(make_views(min_box_side=8.0), boxes, seed)[1:]:
            assert (view.boxes[:, 2:] - view.boxes[:, :2]).min() >= 8.0


def test_a_minimum_visible_side_holds_in_each_view_of_a_crop():
    boxes = random_boxes(60, 5)
    small = []
    for side in (0.0, 8.0):
        for seed in range(30):
            views = make_views(["crop", "crop", 0], (224, 224, 192, 112), min_box_side=side)
            _, second, third, fourth = sample(views, boxes, seed)
            sides = [(v.boxes[:, 2:] - v.boxes[:, :2]).min() for v in (second, third, fourth)]
            small.append(min(sides) < 8)
            assert set(second.region_ids) == set(fourth.region_ids)
            assert not side or min(sides) >= side
    assert any(small)


def test_a_minimum_visible_side_holds_in_a_chain_of_views():
    boxes = random_boxes(60, 5)
    views = make_views(["crop", 0, 1], (224, 224, 224, 64), min_box_side=8.0)
    for seed in range(30):
        for view in sample(views, boxes, seed)[1:]:
            assert (view.boxes[:, 2:] - view.boxes[:, :2]).min() >= 8.0


@pytest.mark.parametrize("area", [(0.5,), (2, 3), (0.5, 0.2)])
def test_impossible_crops_are_named(area):
    with pytest.raises(UserError, match="views.crop_area="):
        make_views(crop_area=area)


def test_cutout_covers_squares_in_half_of_the_further_views_regions():
    boxes = random_boxes(6, 2)
    views, plain = make_views(cutout_prob=0.5), make_views()
    cut, fractions = [], []
    for seed in range(200):
        samples, others = sample(views, boxes, seed), sample(plain, boxes, seed)
        for a, b in zip(samples, others, strict=True):  # nothing else changes
            assert a.geometry == b.geometry and np.array_equal(a.boxes, b.boxes)
        assert samples[0].photometry == others[0].photometry == Photometry()
        for view in samples[1:]:
            row = view.photometry.sample(np.random.default_rng(seed))
            squares = row[len(PhotometryLayout) :].reshape(4, 4)
            assert np.array_equal(squares, np.rint(squares))
            distinct = len(set(view.region_ids))
            assert not squares[distinct:].any()  # repeated regions are cut out once
            for square, box in zip(squares[:distinct], view.boxes, strict=False):
                side = square[2:] - square[:2]
                cut.append(side[0] > 0)
                if side[0] > 0:
                    assert side[0] == side[1]
                    center = (square[:2] + square[2:]) / 2
                    assert (center >= box[:2] - 0.5).all() and (center <= box[2:] + 0.5).all()
                    fractions.append(side.prod() / (box[2:] - box[:2]).prod())
    assert np.mean(cut) == pytest.approx(0.5, abs=0.04)
    # uniform in [0.1, 0.3], up to the rounding to whole pixels
    np.testing.assert_allclose(
        np.quantile(fractions, [0.05, 0.5, 0.95]), [0.11, 0.2, 0.29], atol=0.015
    )


def test_impossible_cutouts_are_named():
    for values in ({"cutout_prob": 1.5}, {"cutout_area": (0.3, 0.1)}, {"cutout_area": (0, 0.5)}):
        with pytest.raises(UserError, match="views.cutout_prob="):
            make_views(**values)
