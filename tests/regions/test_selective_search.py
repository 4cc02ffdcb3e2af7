"""OpenCV's selective search: the same set in every run, and at a working size."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import skimage.data

from region_pretrain.regions.selective_search import selective_search


@pytest.fixture
def image() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[:160, 130:330])


def best_iou(boxes: np.ndarray, target) -> float:
    x0, y0, x1, y1 = target
    w = (np.minimum(boxes[:, 2], x1) - np.maximum(boxes[:, 0], x0)).clip(0)
    h = (np.minimum(boxes[:, 3], y1) - np.maximum(boxes[:, 1], y0)).clip(0)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float((w * h / (areas + (x1 - x0) * (y1 - y0) - w * h)).max())


@pytest.mark.parametrize("mode", ["fast", "quality", "single"])
def test_same_boxes_in_every_run_and_on_any_number_of_threads(image, mode):
    image = image[::2, ::2].copy() if mode == "quality" else image
    before = cv2.getNumThreads()
    results = []
    try:
        for seed, threads in ((1, 1), (2, 1), (3, 4)):
            cv2.setNumThreads(threads)
            cv2.setRNGSeed(seed)
            results.append(selective_search(image, mode))
    finally:
        cv2.setNumThreads(before)
    assert len(results[0]) > 40
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_the_boxes_are_opencvs_of_an_rgb_image(image):
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    search.switchToSelectiveSearchFast()
    expected = {(x, y, x + w, y + h) for x, y, w, h in search.process().tolist()}
    boxes = selective_search(image)
    assert [tuple(b) for b in boxes.tolist()] == sorted(
        expected, key=lambda b: ((b[2] - b[0]) * (b[3] - b[1]), b)
    )


def test_boxes_are_half_open():
    """A rectangle from column 30 to 69 is 40 wide; the whole image ends at its size."""
    image = np.full((80, 120, 3), 30, np.uint8)
    image[20:50, 30:70] = (220, 60, 60)
    boxes = selective_search(image).tolist()
    assert [30, 20, 70, 50] in boxes
    assert [0, 0, 120, 80] in boxes


@pytest.mark.parametrize("working_size", [60, 101])
def test_working_size_finds_about_the_same_object(working_size):
    image = np.full((160, 240, 3), 30, np.uint8)
    image[40:100, 60:140] = (220, 60, 60)
    small = selective_search(image, working_size=working_size)
    assert best_iou(small, (60, 40, 140, 100)) > 0.85
    assert [0, 0, 240, 160] in small.tolist()
    np.testing.assert_array_equal(small, np.rint(small))


def test_working_size_never_enlarges(image):
    full = selective_search(image)
    np.testing.assert_array_equal(selective_search(image, working_size=200), full)
    np.testing.assert_array_equal(selective_search(image, working_size=5000), full)
    assert 0 < len(selective_search(image, working_size=100)) < len(full)


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (300, 1), (8, 8)])
@pytest.mark.parametrize("working_size", [0, 50])
def test_tiny_images(shape, working_size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    boxes = selective_search(image, working_size=working_size)
    assert len(boxes) and boxes.dtype == np.float32
    x0, y0, x1, y1 = boxes.T
    assert ((0 <= x0) & (x0 < x1) & (x1 <= shape[1])).all()
    assert ((0 <= y0) & (y0 < y1) & (y1 <= shape[0])).all()
