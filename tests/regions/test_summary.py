"""Recall and precision of regions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from region_pretrain.regions.summary import Hits, count_hits


def test_objects_and_boxes_are_counted_and_not_pairs():
    objects = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 25]], np.float32)
    # the third box covers its object with IoU 0.5
    assert count_hits(boxes, objects) == Hits(2, (2, 1), judged=3, precise=3)
    assert count_hits(boxes[:0], objects) == Hits(2)
    assert count_hits(boxes, objects[:0]) == Hits()


_corner = st.integers(0, 6)
_size = st.integers(1, 6)
_boxes = st.lists(st.tuples(_corner, _corner, _size, _size), max_size=6)


@given(st.lists(st.tuples(_boxes, _boxes), max_size=4))
def test_recall_and_precision_are_those_of_a_slow_count(images):
    def iou(a, b):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        common = max(width, 0) * max(height, 0)
        return Fraction(common, a[2] * a[3] + b[2] * b[3] - common)

    def xyxy(boxes):
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        return np.array(corners, np.float32).reshape(-1, 4)

    hits = sum((count_hits(xyxy(boxes), xyxy(objects)) for boxes, objects in images), Hits())
    pairs = [(boxes, obj) for boxes, objects in images for obj in objects]
    judged = [(box, objects) for boxes, objects in images for box in boxes if objects]
    for threshold, recall in zip((Fraction(1, 2), Fraction(7, 10)), hits.recall, strict=True):
        found = [any(iou(box, obj) >= threshold for box in boxes) for boxes, obj in pairs]
        if found:
            assert recall == sum(found) / len(found)
    precise = [any(iou(box, obj) >= Fraction(1, 2) for obj in objects) for box, objects in judged]
    assert (hits.judged, hits.precise, hits.objects) == (len(judged), sum(precise), len(pairs))
    if judged:
        assert hits.precision == sum(precise) / len(judged)
