"""Boxes drawn on pictures."""

import cv2
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import ImageFont

from region_pretrain.reporting.boxes import draw_boxes, draw_detections, draw_regions, to_png

GREEN = (60, 225, 80)


def decode(png: bytes) -> np.ndarray:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def coloured(picture: np.ndarray, colour) -> np.ndarray:
    return (picture == colour).all(-1)


def test_boxes_are_drawn_at_their_place():
    image = np.full((400, 500, 3), 128, np.uint8)
    picture = draw_boxes(image, np.array([[100, 50, 300, 250]]), colours=[GREEN])
    assert picture.shape == image.shape and (image == 128).all()  # the input is left alone
    rows, columns = np.nonzero(coloured(picture, GREEN))
    extent = rows.min(), columns.min(), rows.max(), columns.max()
    assert extent == pytest.approx((50, 100, 249, 299), abs=1)  # half-open: ends before 250, 300
    assert (picture[60:240, 110:290] == 128).all()  # not filled


def test_small_pictures_are_enlarged_by_a_whole_number():
    image = np.arange(100 * 100 * 3, dtype=np.uint32).reshape(100, 100, 3).astype(np.uint8)
    picture = draw_boxes(image, np.zeros((0, 4)))
    assert picture.shape == (400, 400, 3)
    assert (picture[::4, ::4] == image).all()
    rows, columns = np.nonzero(
        coloured(draw_boxes(image * 0, np.array([[0, 0, 100, 100]]), colours=[GREEN]), GREEN)
    )
    # a box of the whole picture stays visible on all four sides
    assert rows.min() <= 1 and columns.min() <= 1 and rows.max() >= 397 and columns.max() >= 397


@pytest.mark.parametrize("inside", [False, True])
def test_labels_do_not_cover_each_other(inside):
    image = np.zeros((400, 400, 3), np.uint8)
    boxes = np.array([[50, 60, 250, 160], [50, 60, 300, 260], [52, 58, 320, 200], [1, 1, 60, 70]])
    colours = [GREEN, (255, 70, 70), (85, 150, 255), (255, 215, 0)]
    labels = ["12", "345", "66", "78"]
    together = draw_boxes(image, boxes, labels, colours, labels_inside=inside)
    for box, colour, label in zip(boxes, colours, labels, strict=True):
        alone, bare = (draw_boxes(image, [box], [text], [colour], inside) for text in (label, ""))
        rows, columns = np.nonzero((alone != bare).any(-1))
        sign = alone[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        sign = np.ascontiguousarray(sign[4:-4, 4:-4])  # without the lines of its box
        assert sign.max(-1).min() < 60 and coloured(sign, colour).any()  # text on its colour
        assert cv2.matchTemplate(together, sign, cv2.TM_SQDIFF).min() < 99, label  # in float32


def test_detections_below_the_threshold_are_left_out():
    image = np.zeros((400, 400, 3), np.uint8)
    boxes = np.array([[20, 60, 120, 160], [200, 200, 300, 300]], dtype=np.float32)
    args = image, boxes, [0, 1], ["cat", "dog"]
    picture = draw_detections(*args, scores=[0.4, 0.9])
    assert coloured(picture, GREEN).sum() > 500  # class 1
    assert not coloured(picture, (255, 70, 70)).any()  # class 0
    assert coloured(draw_detections(*args, scores=[0.6, 0.9]), (255, 70, 70)).sum() > 500
    truth = draw_detections(*args)
    assert coloured(truth, (255, 70, 70)).sum() > 500
    # with a score the label is longer
    scored = draw_detections(*args, scores=[1.0, 1.0])
    label = slice(180, 199), slice(200, 300)
    assert coloured(scored[label], GREEN).sum() > coloured(truth[label], GREEN).sum()


def test_labels_have_the_characters_of_their_class():
    """As drawn by Pillow in DejaVu Sans, which has Latin, Greek and Cyrillic ones."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)
    image, boxes = np.zeros((100, 400, 3), np.uint8), np.array([[20, 40, 300, 90]])
    for name in ("vélo", "собака", "σκύλος"):
        mask = font.getmask(name)
        expected = np.array(mask, dtype=int).reshape(mask.size[::-1]) > 200
        picture = draw_detections(image, boxes, [1], ["", name])
        dark = picture[:40].max(-1) < 50
        windows = np.lib.stride_tricks.sliding_window_view(dark[:, 20:], expected.shape)
        assert (windows == expected).mean((2, 3)).max() > 0.97, name


def test_a_label_that_no_font_has_is_drawn_all_the_same():
    image, boxes = np.zeros((100, 400, 3), np.uint8), np.array([[20, 40, 300, 90]])
    picture = draw_detections(image, boxes, [1], ["", "\U0010fff0" * 3])
    assert coloured(picture[20:38], GREEN).sum() > 200
    broken = draw_detections(image, boxes, [1], ["", "a\nb"])
    assert np.array_equal(broken, draw_detections(image, boxes, [1], ["", "a b"]))


def test_the_same_region_has_the_same_colour_in_both_views():
    image = np.zeros((400, 400, 3), np.uint8)
    left, right = [20, 60, 120, 160], [200, 60, 300, 160]
    first = image, np.array([left, right, right]), [7, 3, -1]
    second = image, np.array([right, left, left]), [7, 9, 9]
    a, b = draw_regions([first, second])
    red, grey = (255, 70, 70), (170, 170, 170)

    def side(picture, colour):
        counts = [int(coloured(half, colour).sum()) for half in np.split(picture, 2, axis=1)]
        return [count > 500 for count in counts]

    assert side(a, red) == [True, False] and side(b, red) == [False, True]  # id 7
    assert side(a, grey) == [False, True] and side(b, grey) == [True, False]  # ids 3 and 9


def test_png_keeps_the_picture_and_limits_its_width():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)
    assert (decode(to_png(image)) == image).all()
    assert decode(to_png(image, max_width=20)).shape == (15, 20, 3)
