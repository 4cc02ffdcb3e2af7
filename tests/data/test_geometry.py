"""Views as affines: pixels, boxes and points are mapped to the same places."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import RandomResizedCrop

from region_pretrain.data.geometry import (
    ViewGeometry,
    boxes_in_view,
    map_boxes,
    map_points,
    overlaps,
    random_resized_crop,
    render,
    whole_image,
)


@st.composite
def geometries(draw):
    width, height = draw(st.integers(20, 300)), draw(st.integers(20, 300))
    w, h = draw(st.integers(8, width)), draw(st.integers(8, height))
    left, top = draw(st.integers(0, width - w)), draw(st.integers(0, height - h))
    size = (draw(st.integers(8, 128)), draw(st.integers(8, 128)))
    return width, height, ViewGeometry(left, top, w, h, size, draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(geometries(), st.booleans())
def test_pixels_that_encode_their_coordinates_agree_with_the_affine(case, antialias):
    width, height, geometry = case
    # Channels 0 and 1 contain x and y of the pixel's centre, scaled to 8 bits.
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    image = np.stack([x / width * 255, y / height * 255, 0 * x], axis=2).round().astype(np.uint8)
    view = render(image, geometry, np.empty((*geometry.size, 3), np.uint8), antialias)

    rows, columns = np.mgrid[: geometry.size[0], : geometry.size[1]] + 0.5
    centers = np.stack([columns, rows], axis=-1)
    inverse = cv2.invertAffineTransform(geometry.affine.astype(np.float64))
    original = map_points(inverse, centers)
    # At the crop's border the filter repeats the edge: half an original pixel, or half a view
    # pixel where it shrinks. Rounding to 8 bits adds half a level.
    for axis, extent, crop, side in (
        (0, width, geometry.width, geometry.size[1]),
        (1, height, geometry.height, geometry.size[0]),
    ):
        decoded = view[..., axis] / 255 * extent
        tolerance = max(0.5, 0.5 * crop / side) + 1.01 * extent / 255
        assert np.abs(decoded - original[..., axis]).max() <= tolerance


@settings(max_examples=100, deadline=None)
@given(geometries(), st.integers(0, 2**32 - 1))
def test_boxes_follow_the_crop_formula(case, seed):
    width, height, geometry = case
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (5, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)

    # Clip to the crop, move to its origin, scale, flip: the slow way, one box at a time.
    slow = []
    for x0, y0, x1, y1 in boxes:
        x0, x1 = (np.clip(v - geometry.left, 0, geometry.width) for v in (x0, x1))
        y0, y1 = (np.clip(v - geometry.top, 0, geometry.height) for v in (y0, y1))
        sx, sy = geometry.size[1] / geometry.width, geometry.size[0] / geometry.height
        x0, x1, y0, y1 = x0 * sx, x1 * sx, y0 * sy, y1 * sy
        if geometry.flip:
            x0, x1 = geometry.size[1] - x1, geometry.size[1] - x0
        slow.append((x0, y0, x1, y1))
    fast = boxes_in_view(geometry, boxes)
    np.testing.assert_allclose(fast, np.array(slow), atol=2e-3)
    assert torch.equal(
        clip_boxes_to_image(torch.from_numpy(fast), geometry.size), torch.from_numpy(fast)
    )
    areas = (fast[:, 2:] - fast[:, :2]).prod(axis=1)
    shown = overlaps(geometry.crop_box, boxes)
    assert (areas[~shown] < 1e-2).all()


def test_a_flip_twice_is_no_flip():
    once = ViewGeometry(0, 0, 50, 40, (40, 50), flip=True)
    boxes = np.array([[3, 4, 20, 30]], np.float32)
    np.testing.assert_allclose(map_boxes(once.affine, boxes), [[30, 4, 47, 30]])
    np.testing.assert_allclose(map_boxes(once.affine, map_boxes(once.affine, boxes)), boxes)


def test_random_resized_crop_has_torchvisions_distribution():
    rng = np.random.default_rng(0)
    width, height, area, aspect = 500, 375, (0.3, 1.0), (3 / 4, 4 / 3)
    ours = np.array(
        [
            (g.left, g.top, g.width, g.height)
            for g in (
                random_resized_crop(width, height, (224, 224), rng, area, aspect)
                for _ in range(4000)
            )
        ]
    )
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, area, aspect) for _ in range(4000)])
    theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width -> left, top, width, height
    error = np.sqrt(ours.var(axis=0) / 4000 + theirs.var(axis=0) / 4000)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.06)
    assert (ours[:, :2] + ours[:, 2:] <= (width, height)).all()


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13))]
)
def test_an_extreme_aspect_ratio_falls_back_to_the_largest_center_crop(width, height, expected):
    rng = np.random.default_rng(0)
    geometry = random_resized_crop(width, height, (8, 8), rng, (0.9, 1.0))
    assert (geometry.left, geometry.top, geometry.width, geometry.height) == expected


def test_the_whole_image_is_stretched():
    rng = np.random.default_rng(0)
    geometries = [whole_image(500, 400, (224, 224), rng) for _ in range(400)]
    assert 160 < sum(geometry.flip for geometry in geometries) < 240  # 4 standard deviations
    boxes = np.array([[0, 0, 500, 400], [0, 100, 250, 400]], np.float32)
    expected = {False: [0, 56, 112, 224], True: [112, 56, 224, 224]}
    for geometry in geometries[:20]:
        seen = boxes_in_view(geometry, boxes)
        np.testing.assert_allclose(seen, [[0, 0, 224, 224], expected[geometry.flip]])
