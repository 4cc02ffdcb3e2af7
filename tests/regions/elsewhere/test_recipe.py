"""Filters of given boxes, and their assignment to images."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from region_pretrain.errors import UserError
from region_pretrain.regions.elsewhere import FileRecipe, attach, load_boxes
from region_pretrain.regions.elsewhere.formats import Boxes
from region_pretrain.regions.elsewhere.matching import GIVEN, Given
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.recipes import change, get_recipe
from region_pretrain.regions.summary import format_summary

NAN, INF = float("nan"), float("inf")


def select(boxes, scores, size=(100, 90), seed=0, **changes):
    recipe = change(FileRecipe("file-v1", source="00"), changes)
    scores = None if scores is None else np.array(scores, np.float32)
    given = Given(np.array(boxes, np.float32).reshape(-1, 4), scores, None, "boxes.json")
    return recipe.select(given, *size, np.random.default_rng(seed))


def test_unusable_boxes_are_dropped_and_counted():
    found = select(
        [
            [10, 10, 20, 20],
            [-5, 10, 20, 20],  # clipped
            [-0.5, 10, 20, 25],  # a rounding error: not counted
            [90, 80, 120, 100],  # clipped
            [NAN, 10, 20, 20],
            [0, 0, INF, 20],
            [30, 30, 30, 40],  # no width
            [40, 40, 30, 50],  # negative
            [101, 0, 120, 50],  # outside
            [1, 1, 9, 9],  # its score is no number
        ],
        [0.5, 0.9, 0.1, 0.2, 1, 1, 1, 1, 1, NAN],
    )
    assert found.boxes.tolist() == [
        [0, 10, 20, 20], [10, 10, 20, 20], [90, 80, 100, 90], [0, 10, 20, 25],
    ]  # fmt: skip
    assert (found.given, found.dropped, found.clipped) == (10, 6, 2)


def test_filters_by_score_overlap_number_and_size():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 80, 80], [0, 0, 10, 10], [0, 50, 90, 60]]
    scores = [0.5, 0.75, 0.25, 0.625, 1.0]
    every = [boxes[i] for i in (4, 1, 0, 2)]  # the fourth is the first again, with a higher score
    assert select(boxes, scores).boxes.tolist() == every
    assert select(boxes, scores, min_score=0.625).boxes.tolist() == every[:3]
    assert select(boxes, scores, nms_iou=0.85).boxes.tolist() == [*every[:2], boxes[2]]
    assert select(boxes, scores, top=2).boxes.tolist() == every[:2]
    assert select(boxes, scores, max_aspect=3).boxes.tolist() == [boxes[i] for i in (1, 0, 2)]
    assert select(boxes, scores, min_side=11).boxes.tolist() == [boxes[2]]
    assert select(boxes, scores, min_size_ratio=0.5).boxes.tolist() == [boxes[2]]
    assert select(boxes, scores, max_size_ratio=0.2).boxes.tolist() == [boxes[i] for i in (1, 0)]


def test_without_scores_the_order_is_random_but_not_that_of_the_file():
    boxes = [[i, i, i + 10, i + 10] for i in range(20)]
    found = select(boxes, None).boxes.tolist()
    assert sorted(found) == boxes != found
    assert select(boxes[::-1], None).boxes.tolist() == found
    assert select(boxes, None, seed=1).boxes.tolist() != found
    with pytest.raises(UserError, match="boxes.json has no scores: leave out min_score"):
        select(boxes, None, min_score=0.1)


corner = st.integers(-5, 105)


@given(
    st.lists(st.tuples(corner, corner, corner, corner, st.integers(0, 4)), max_size=12),
    st.sampled_from([1.0, 0.5, 0.2]),
    st.integers(0, 3),
)
def test_selection_is_that_of_a_slow_restatement(rows, iou, top):
    boxes, scores = [row[:4] for row in rows], [row[4] / 4 for row in rows]
    best: dict[tuple, float] = {}
    for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True):
        box = (max(x0, 0), max(y0, 0), min(x1, 100), min(y1, 90))
        if box[0] < box[2] and box[1] < box[3]:
            best[box] = max(score, best.get(box, 0))
    kept = []
    for box in sorted(best, key=lambda b: (-best[b], b[::-1])):
        overlaps = [float(box_iou(*(_tensor(b) for b in (box, k)))) for k in kept]
        if all(value <= iou for value in overlaps):
            kept.append(box)
    found = select(boxes, scores, nms_iou=iou, top=top).boxes.tolist()
    assert found == [list(map(float, box)) for box in kept[: top or None]]


def _tensor(box):
    import torch

    return torch.tensor([box], dtype=torch.float64)


def test_ids_and_limits():
    recipe = FileRecipe("file-v1", source="3f2a")
    assert recipe.id == "file-v1+source=3f2a"
    changed = change(recipe, {"min_score": "0.5", "top": 50, "max_aspect": "3"})
    assert changed.id == "file-v1+max_aspect=3+min_score=0.5+source=3f2a+top=50"
    for field, value in (("max_aspect", 0.5), ("min_score", -1), ("top", 1.5), ("colour", 1)):
        with pytest.raises(UserError, match=field):
            change(recipe, {field: value})
    with pytest.raises(UserError, match="recipe file-v1 needs its source: .*--from PATH"):
        get_recipe("file-v1+source=3f2a")


def _records(*paths):
    return [{"file_name": f"/data/{path}", "image_id": path} for path in paths]


def _attached(records, names, tmp_path, folder=False):
    if folder:
        boxes = Boxes(str(tmp_path), "masks", "", files=names)
    else:
        path = tmp_path / "b.json"
        path.write_text(
            json.dumps([{"file_name": name, "bbox": [i, 0, 9, 9]} for i, name in enumerate(names)])
        )
        boxes = load_boxes(str(path))
    found = [record.get(GIVEN) for record in attach(records, boxes)]
    if folder:
        return [None if f is None else names.index(os.path.relpath(f, tmp_path)) for f in found]
    return [None if f is None else int(f.boxes[0, 0]) for f in found]


def test_names_match_by_the_ends_of_paths(tmp_path):
    records = _records("a.jpg", "x/b.jpg", "x/c.jpg", "y/c.jpg")
    names = ["x/c.jpg", "b.jpg", "./a.jpg", "/other/machine/y/c.jpg", "z.jpg"]
    assert _attached(records, names, tmp_path) == [2, 1, 0, 3]
    assert _attached(records, ["data/x/c.jpg", "x\\b.jpg"], tmp_path) == [None, 1, 0, None]
    assert _attached(records, ["x/c.json", "a.json"], tmp_path, True) == [1, None, 0, None]
    for folder in (False, True):
        ending = ".json" if folder else ".jpg"
        with pytest.raises(UserError, match=rf"c{ending} could be .*/x/c.* and .*/y/c"):
            _attached(records, [f"c{ending}"], tmp_path, folder)
        with pytest.raises(UserError, match="b.* and x/b.* are both /data/x/b.jpg"):
            _attached(records, [f"b{ending}", f"x/b{ending}"], tmp_path, folder)
        with pytest.raises(UserError, match="has boxes for none of the 4 images: its file names"):
            _attached(records, [f"q{ending}"], tmp_path, folder)


def test_boxes_of_other_images_are_refused(tmp_path, records):
    """Widths and heights as corners of a box, and the size of another image."""
    path = tmp_path / "b.json"
    entries = [{"image_id": "im/0", "bbox": [95, 80, 99, 89]}] + [
        {"image_id": "im/1", "bbox": [i, 50, -10, 60]} for i in range(2)
    ]
    path.write_text(json.dumps(entries))
    boxes = load_boxes(str(path))
    recipe = FileRecipe("file-v1", source=boxes.digest)
    with pytest.raises(UserError, match="of 3 boxes, 2 are not finite or outside .*, and 1 r"):
        make_regions(attach(records, boxes), str(tmp_path / "r.arrow"), recipe, workers=1)

    corners = [{"image_id": "im/1", "bbox": [50, 40 + i, 90, 80]} for i in range(4)]
    path.write_text(json.dumps(corners))
    boxes = load_boxes(str(path))
    recipe = FileRecipe("file-v1", source=boxes.digest)
    with pytest.raises(UserError, match="of 4 boxes, 0 are .*, and 4 reach out of it: are they"):
        make_regions(attach(records, boxes), str(tmp_path / "q.arrow"), recipe, workers=1)

    good = [{"image_id": "im/1", "bbox": [1, 2, 3, 4 + i]} for i in range(4)]
    path.write_text(json.dumps(entries[:2] * 2 + good))
    boxes = load_boxes(str(path))
    recipe = FileRecipe("file-v1", source=boxes.digest)
    out = str(tmp_path / "s.arrow")
    summary = make_regions(attach(records, boxes), out, recipe, workers=2, part_size=1)
    assert (summary["boxes"], summary["dropped"], summary["clipped"]) == (5, 2, 2)
    assert (
        "given:  8 boxes; 2 are not finite or outside their image, 2 were clipped to it"
        in format_summary(summary)
    )
    # Extended by an image: the counts remain.
    more = [*records, {"file_name": records[0]["file_name"], "image_id": "im/99"}]
    again = make_regions(attach(more, boxes), out, recipe, workers=1)
    assert (again["images"], again["dropped"], again["clipped"]) == (12, 2, 2)

    table = boxes.table._replace(sizes={"im/0": (90, 100)})
    with pytest.raises(UserError, match="00.png .boxes of .*b.json. is 100x90, .* for 90x100"):
        boxes.table = table
        make_regions(attach(records, boxes), str(tmp_path / "t.arrow"), recipe, workers=1)
