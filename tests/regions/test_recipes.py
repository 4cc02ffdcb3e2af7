"""Recipes: the published filters, and ids."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st

from region_pretrain.errors import UserError
from region_pretrain.regions.recipes import RECIPES, get_recipe
from region_pretrain.regions.selective_search import selective_search

BIG_ENOUGH = (0, 0, 40, 40)  # passes the side and the aspect rule, too small for the size rule
LONG = (0, 0, 320, 100)  # passes the side rule only


def xyxy(*boxes) -> np.ndarray:
    """From (x, y, w, h)."""
    return np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], np.float32).reshape(-1, 4)


def sizes(boxes) -> list:
    return [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes.tolist()]


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((100, 50, 200, 100), True),  # ratio 2.0, size ratio 0.3162
        ((0, 0, 134, 134), False),  # 0.2996
        ((0, 0, 135, 135), True),
        ((0, 0, 357, 357), True),  # 0.7983
        ((0, 0, 358, 358), False),  # 0.8005
        (LONG, False),  # ratio 3.2
        ((0, 0, 31, 90), False),
    ],
)
def test_soco_filter_on_500x400(box, kept):
    certain = (10, 10, 200, 200)  # avoids the fallbacks
    result = sizes(get_recipe("soco-v1").filter(xyxy(certain, box), 500, 400))
    assert result == [certain, box] if kept else result == [certain]


def test_soco_box_keeps_its_width_and_height():
    kept = get_recipe("soco-v1").filter(xyxy((100, 50, 200, 100)), 500, 400)
    assert kept.tolist() == [[100, 50, 300, 150]]
    assert kept.dtype == np.float32


def test_soco_fallbacks_in_their_order():
    small = (0, 0, 31, 31)
    soco = get_recipe("soco-v1")
    good = (0, 0, 200, 200)
    assert sizes(soco.filter(xyxy(small, BIG_ENOUGH, LONG, good), 500, 400)) == [good]
    assert sizes(soco.filter(xyxy(small, BIG_ENOUGH, LONG), 500, 400)) == [BIG_ENOUGH]
    assert sizes(soco.filter(xyxy(small, LONG), 500, 400)) == [LONG]
    assert soco.filter(xyxy(small), 500, 400).shape == (0, 4)
    assert soco.filter(xyxy(), 500, 400).shape == (0, 4)


def test_shapes_filter_is_the_same_with_other_numbers():
    shapes = get_recipe("shapes-v1")
    # 128x128: ratios 0.12 to 0.8 are sides 15.36 to 102.4
    boxes = xyxy((0, 0, 15, 15), (0, 0, 16, 16), (0, 0, 102, 102), (0, 0, 103, 103), (0, 0, 9, 27))
    assert sizes(shapes.filter(boxes, 128, 128)) == [(0, 0, 16, 16), (0, 0, 102, 102)]


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((0, 0, 20, 20), False),  # size not > 20
        ((0, 0, 21, 20), True),
        ((0, 0, 60, 20), False),  # ratio exactly 3
        ((0, 0, 59, 20), True),
        ((0, 0, 30, 10), False),  # ratio 3 and size 17.3
    ],
)
def test_ccop_filter(box, kept):
    assert len(get_recipe("ccop-v1").filter(xyxy(box))) == kept


@st.composite
def boxes_and_order(draw):
    one = st.tuples(
        st.integers(0, 499), st.integers(0, 399), st.integers(1, 500), st.integers(1, 400)
    )
    boxes = [(x, y, min(w, 500 - x), min(h, 400 - y)) for x, y, w, h in draw(st.lists(one))]
    return xyxy(*boxes), np.array(draw(st.permutations(range(len(boxes)))), int)


@given(boxes_and_order())
@pytest.mark.parametrize("name", ["soco-v1", "shapes-v1", "ccop-v1"])
def test_filters_return_a_subset(name, drawn):
    """Subset, idempotent, order independent; therefore inside the image."""
    boxes, order = drawn
    recipe = get_recipe(name)
    arguments = () if name == "ccop-v1" else (500, 400)
    kept = recipe.filter(boxes, *arguments)
    assert all(box in boxes.tolist() for box in kept.tolist())
    np.testing.assert_array_equal(recipe.filter(kept, *arguments), kept)
    again = recipe.filter(boxes[order], *arguments)
    assert sorted(again.tolist()) == sorted(kept.tolist())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_returns_boxes_inside_the_image(name):
    image = np.ascontiguousarray(skimage.data.coffee()[:150, 100:300])
    record = {"annotations": [{"bbox": [10, 20, 300, 40], "bbox_mode": 0}]}
    boxes = get_recipe(name)(image, record, np.random.default_rng(5))
    assert boxes.dtype == np.float32 and boxes.shape[1] == 4
    assert len(boxes) >= (1 if name == "ground_truth-v1" else 10)
    x0, y0, x1, y1 = boxes.T
    assert ((0 <= x0) & (x0 < x1) & (x1 <= 200) & (0 <= y0) & (y0 < y1) & (y1 <= 150)).all()
    again = get_recipe(name)(image, record, np.random.default_rng(5))
    np.testing.assert_array_equal(boxes, again)


def test_selective_search_recipes_take_their_boxes_from_the_search():
    image = np.ascontiguousarray(skimage.data.chelsea()[60:220, 80:320])
    found = selective_search(image)
    soco = get_recipe("soco-v1")(image, {}, np.random.default_rng(0))
    np.testing.assert_array_equal(soco, get_recipe("soco-v1").filter(found, 240, 160))
    ccop = get_recipe("ccop-v1")(image, {}, np.random.default_rng(0))
    assert {*map(tuple, ccop.tolist())} <= {*map(tuple, found.tolist())}
    assert 10 < len(ccop) <= 50
    few = get_recipe("ccop-v1", {"max_boxes": 7})(image, {}, np.random.default_rng(0))
    np.testing.assert_array_equal(few, ccop[:7])
    other = get_recipe("ccop-v1")(image, {}, np.random.default_rng(1))
    assert other.tolist() != ccop.tolist()


def test_random_boxes_pass_the_filter_that_they_are_compared_with():
    image = np.zeros((400, 500, 3), np.uint8)
    boxes = get_recipe("random-v1")(image, {}, np.random.default_rng(0))
    assert boxes.shape == (100, 4)
    np.testing.assert_array_equal(get_recipe("soco-v1").filter(boxes, 500, 400), boxes)


def test_blank_and_tiny_images():
    for shape in ((64, 64), (1, 1), (1, 300)):
        image = np.full((*shape, 3), 120, np.uint8)
        for name in set(RECIPES) - {"ground_truth-v1"}:
            assert get_recipe(name)(image, {}, np.random.default_rng(0)).shape[1] == 4


@pytest.mark.parametrize(
    ("recipe_id", "overrides", "expected"),
    [
        ("soco-v1", {}, "soco-v1"),
        ("soco-v1", {"mode": "quality"}, "soco-v1+mode=quality"),
        ("soco-v1", {"min_side": "16", "mode": "fast"}, "soco-v1+min_side=16"),
        ("soco-v1+working_size=300", {"mode": "single"}, "soco-v1+mode=single+working_size=300"),
        ("shapes-v1", {"min_side": 10.0}, "shapes-v1"),
        ("shapes-v1", {"min_side": 32.0}, "shapes-v1+min_side=32"),
        ("ccop-v1", {"nms_iou": "0.123456789"}, "ccop-v1+nms_iou=0.123456789"),
        ("grid-v1", {"divisions": "2-4-8"}, "grid-v1+divisions=2-4-8"),
        ("soco-v1", {"max_aspect": "1000000"}, "soco-v1+max_aspect=1e06"),
    ],
)
def test_an_id_names_the_changed_fields_and_restores_the_recipe(recipe_id, overrides, expected):
    recipe = get_recipe(recipe_id, overrides)
    assert recipe.id == expected
    assert get_recipe(recipe.id) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_published_numbers():
    assert get_recipe("soco-v1").parameters == {
        "mode": "fast",
        "working_size": 0,
        "min_side": 32.0,
        "max_aspect": 3.0,
        "min_size_ratio": 0.3,
        "max_size_ratio": 0.8,
    }
    changed = {"min_side": 10.0, "min_size_ratio": 0.12}
    assert get_recipe("shapes-v1").parameters == get_recipe("soco-v1").parameters | changed
    ccop = get_recipe("ccop-v1").parameters
    assert (ccop["min_size"], ccop["max_aspect"], ccop["nms_iou"], ccop["max_boxes"]) == (
        20,
        3,
        0.5,
        50,
    )


def test_recipes_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("soco-v1").min_side = 1


@pytest.mark.parametrize(
    ("recipe_id", "overrides", "message"),
    [
        ("soco", {}, "did you mean soco-v1"),
        ("soco-v1+mode", {}, "not field=value"),
        ("soco-v1", {"colour": 1}, "no field 'colour'"),
        ("soco-v1", {"name": "x"}, "no field 'name'"),
        ("soco-v1", {"mode": "slow"}, "fast, quality, single"),
        ("soco-v1", {"working_size": "1.5"}, "not a whole number"),
        ("soco-v1", {"working_size": -1}, "at least 0"),
        ("soco-v1", {"min_side": "wide"}, "not a number"),
        ("soco-v1", {"min_side": "nan"}, "at least 0"),
        ("soco-v1", {"min_size_ratio": 0.9}, "at most max_size_ratio"),
        ("soco-v1", {"max_aspect": 0.5}, "at least 1"),
        ("grid-v1", {"overlap": 1}, "less than 1"),
        ("grid-v1", {"divisions": "0-2"}, "from 1 up"),
        ("random-v1", {"min_size_ratio": 0}, "more than 0"),
    ],
)
def test_invalid_ids_and_fields_are_refused(recipe_id, overrides, message):
    with pytest.raises(UserError, match=message):
        get_recipe(recipe_id, overrides)
