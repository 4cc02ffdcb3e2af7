"""The filters against a box-by-box restatement in exact fractions, and their properties."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from region_pretrain.regions import filters

WIDTH, HEIGHT = 500, 400


def xywh(x, y, w, h) -> np.ndarray:
    return np.array([[x, y, x + w, y + h]], np.float32)


@st.composite
def boxes_in_image(draw) -> np.ndarray:
    """Up to 30 boxes on whole pixels of a 500x400 image, duplicates among them."""
    corner = st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1)
    one = st.tuples(*corner, st.integers(1, WIDTH), st.integers(1, HEIGHT))
    drawn = [(x, y, min(x + w, WIDTH), min(y + h, HEIGHT)) for x, y, w, h in draw(st.lists(one))]
    drawn += [
        drawn[i % len(drawn)] for i in draw(st.lists(st.integers(0, 99), max_size=3)) if drawn
    ]
    return np.array(drawn, np.float32).reshape(-1, 4)


TESTS = {
    "min_side": (
        lambda b: filters.min_side(b, 32),
        lambda w, h: w >= 32 and h >= 32,
    ),
    "max_aspect": (
        lambda b: filters.max_aspect(b, 3),
        lambda w, h: Fraction(1, 3) <= Fraction(w, h) <= 3,
    ),
    "max_aspect_strict": (
        lambda b: filters.max_aspect(b, 3, strict=True),
        lambda w, h: Fraction(1, 3) < Fraction(w, h) < 3,
    ),
    "size_ratio": (
        lambda b: filters.size_ratio(b, 0.3, 0.8, WIDTH, HEIGHT),
        lambda w, h: Fraction(9, 100) <= Fraction(w * h, WIDTH * HEIGHT) <= Fraction(64, 100),
    ),
}


@pytest.mark.parametrize("name", TESTS)
@given(boxes=boxes_in_image())
def test_keeps_the_boxes_of_the_rule(name, boxes):
    filter_, rule = TESTS[name]
    keep = filter_(boxes)
    assert keep.dtype == bool
    expected = [rule(int(x1 - x0), int(y1 - y0)) for x0, y0, x1, y1 in boxes.tolist()]
    assert keep.tolist() == expected


@pytest.mark.parametrize("name", TESTS)
@given(boxes=boxes_in_image(), data=st.data())
def test_each_box_is_judged_alone(name, boxes, data):
    filter_, _ = TESTS[name]
    keep = filter_(boxes)
    assert filter_(boxes[keep]).all()  # idempotent
    order = np.array(data.draw(st.permutations(range(len(boxes)))), int)
    np.testing.assert_array_equal(filter_(boxes[order]), keep[order])


@pytest.mark.parametrize(
    ("w", "h", "rule", "kept"),
    [
        (300, 100, "max_aspect", True),  # ratio exactly 3
        (300, 100, "max_aspect_strict", False),
        (100, 300, "max_aspect_strict", False),
        (299, 100, "max_aspect_strict", True),
        (301, 100, "max_aspect", False),
        (32, 32, "min_side", True),
        (31, 400, "min_side", False),
        (400, 320, "size_ratio", True),  # 0.8 exactly
        (150, 120, "size_ratio", True),  # 0.3 exactly
        (150, 119, "size_ratio", False),
    ],
)
def test_limits(w, h, rule, kept):
    assert TESTS[rule][0](xywh(0, 0, w, h)).tolist() == [kept]


@given(boxes=boxes_in_image(), data=st.data())
def test_canonical_is_the_set_in_one_order(boxes, data):
    result = filters.canonical(boxes)
    assert result.dtype == np.float32
    as_tuples = [tuple(box) for box in result.tolist()]
    expected = {tuple(box) for box in boxes.tolist()}
    assert as_tuples == sorted(expected, key=lambda b: ((b[2] - b[0]) * (b[3] - b[1]), b))
    order = np.array(data.draw(st.permutations(range(len(boxes)))), int)
    np.testing.assert_array_equal(filters.canonical(boxes[order]), result)
    np.testing.assert_array_equal(filters.canonical(result), result)


@given(
    st.lists(
        st.tuples(*[st.floats(-300, 800, width=32) for _ in range(4)]),
        max_size=20,
    )
)
def test_clipped_boxes_are_in_the_image_and_not_empty(boxes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    result = filters.clip(boxes, WIDTH, HEIGHT)
    assert result.dtype == np.float32
    x0, y0, x1, y1 = result.T
    assert ((0 <= x0) & (x0 < x1) & (x1 <= WIDTH) & (0 <= y0) & (y0 < y1) & (y1 <= HEIGHT)).all()
    np.testing.assert_array_equal(filters.clip(result, WIDTH, HEIGHT), result)
    overlapping = [
        min(b[2], WIDTH) > max(b[0], 0) and min(b[3], HEIGHT) > max(b[1], 0) for b in boxes.tolist()
    ]
    assert len(result) == sum(overlapping)


def test_clip_cuts_at_the_border():
    boxes = np.array([[-5, 10, 600, 20], [-5, 0, 0, 9], [499, 399, 700, 700]], np.float32)
    assert filters.clip(boxes, WIDTH, HEIGHT).tolist() == [[0, 10, 500, 20], [499, 399, 500, 400]]


def exact_iou(a, b) -> Fraction:
    a, b = [int(v) for v in a], [int(v) for v in b]
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return Fraction(w * h, sum(areas) - w * h)


@given(boxes=boxes_in_image(), seed=st.integers(0, 1000))
def test_random_nms_is_greedy_in_the_order_it_returns(boxes, seed):
    """Survivors overlap little, and every removed box overlaps a survivor too much."""
    boxes = filters.canonical(boxes)
    kept = filters.random_nms(boxes, 0.5, 1000, np.random.default_rng(seed)).tolist()
    assert all(box in boxes.tolist() for box in kept)
    for i, box in enumerate(kept):
        assert all(exact_iou(box, other) <= Fraction(1, 2) for other in kept[:i])
    for box in boxes.tolist():
        assert box in kept or any(exact_iou(box, other) > Fraction(1, 2) for other in kept)
    few = filters.random_nms(boxes, 0.5, 2, np.random.default_rng(seed)).tolist()
    assert few == kept[:2]


def test_random_nms_keeps_a_pair_at_the_threshold():
    boxes = np.array([[0, 0, 20, 10], [0, 0, 10, 10]], np.float32)  # IoU 0.5 exactly
    assert len(filters.random_nms(boxes, 0.5, 50, np.random.default_rng(0))) == 2
    assert len(filters.random_nms(boxes, 0.499, 50, np.random.default_rng(0))) == 1


def test_random_nms_lets_any_box_of_a_cluster_survive():
    boxes = np.array([[0, 0, 100, 100 + i] for i in range(4)], np.float32)
    survivors = [
        filters.random_nms(boxes, 0.5, 50, np.random.default_rng(seed))[0, 3] - 100
        for seed in range(400)
    ]
    counts = np.bincount(np.array(survivors, int), minlength=4)
    # 100 expected of each; 4 standard deviations are 35.
    assert counts.sum() == 400 and (np.abs(counts - 100) < 35).all()
