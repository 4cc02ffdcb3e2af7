"""Sources of regions that do not depend on the pixels."""

import numpy as np
import pytest
from detectron2.structures import BoxMode

from region_pretrain.errors import UserError
from region_pretrain.regions.sources import grid_boxes, ground_truth_boxes, random_boxes


def test_grid_by_hand():
    boxes = grid_boxes(100, 60, [2], overlap=0)
    expected = [[0, 0, 50, 30], [0, 30, 50, 60], [50, 0, 100, 30], [50, 30, 100, 60]]
    assert sorted(boxes.tolist()) == expected
    assert grid_boxes(100, 60, [1], overlap=0.5).tolist() == [[0, 0, 100, 60]]


def test_grid_with_half_overlap_has_nine_and_twenty_five_windows():
    for n, count in ((2, 9), (3, 25)):
        boxes = grid_boxes(600, 300, [n], overlap=0.5)
        assert len(boxes) == count
        assert set(map(tuple, (boxes[:, 2:] - boxes[:, :2]).tolist())) == {(600 / n, 300 / n)}
        step = 600 / n / 2
        assert sorted(set(boxes[:, 0].tolist())) == [step * i for i in range(2 * n - 1)]
    assert len(grid_boxes(600, 300, [2, 3], overlap=0.5)) == 34


def test_grid_covers_every_pixel_of_odd_sizes():
    for width, height in ((7, 5), (101, 33), (1, 1)):
        covered = np.zeros((height, width), bool)
        for x0, y0, x1, y1 in grid_boxes(width, height, [3], overlap=0.5).astype(int):
            covered[y0:y1, x0:x1] = True
        assert covered.all()


def test_random_boxes_have_the_documented_distribution():
    boxes = random_boxes(800, 600, 20_000, (0.3, 0.8), 3.0, np.random.default_rng(0))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (800, 600)).all()
    assert np.array_equal(boxes, np.rint(boxes))
    ratio = np.sqrt(sides.prod(axis=1) / (800 * 600))
    assert 0.298 < ratio.min() and ratio.max() < 0.802
    small = boxes[ratio < 0.4]  # all of these fit, so nothing was dropped to bend the law
    sides = small[:, 2:] - small[:, :2]
    stretch = np.log(sides[:, 0] / sides[:, 1]) / np.log(3)
    assert abs(stretch.mean()) < 0.03 and abs(stretch.std() - 1 / np.sqrt(3)) < 0.02
    place = small[:, :2] / ((800, 600) - sides)
    assert np.abs(place.mean(axis=0) - 0.5).max() < 0.02
    # log-uniform sizes: the fraction below 0.4, before any box was dropped
    assert abs(len(small) / 20_000 - np.log(0.4 / 0.3) / np.log(0.8 / 0.3)) < 0.02


def test_ground_truth_without_crowds_and_empty_boxes():
    record = {
        "file_name": "a.jpg",
        "width": 100,
        "height": 50,
        "annotations": [
            {"bbox": [10, 20, 30, 25], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0},
            {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS},
            {"bbox": [0, 0, 90, 40], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 1},
            {"bbox": [5, 5, 0, 9], "bbox_mode": BoxMode.XYWH_ABS},
            {"bbox": [90, 40, 20, 20], "bbox_mode": BoxMode.XYWH_ABS},
        ],
    }
    boxes = ground_truth_boxes(record, 100, 50)
    assert boxes.dtype == np.float32
    assert boxes.tolist() == [[1, 2, 3, 4], [90, 40, 100, 50], [10, 20, 40, 45]]
    assert ground_truth_boxes({"annotations": []}, 100, 50).shape == (0, 4)


def test_ground_truth_that_is_missing_or_of_another_size_is_refused():
    with pytest.raises(UserError, match="a.jpg.*no annotations"):
        ground_truth_boxes({"file_name": "a.jpg"}, 100, 50)
    record = {"file_name": "a.jpg", "width": 50, "height": 100, "annotations": []}
    with pytest.raises(UserError, match="a.jpg is 100x50, but its annotations are for 50x100"):
        ground_truth_boxes(record, 100, 50)
