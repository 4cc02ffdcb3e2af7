"""Boxes drawn on images, and images as PNG."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: RGB colours of boxes: bright, as most images are not.
_BOX_COLOURS = (
    (255, 70, 70),
    (60, 225, 80),
    (85, 150, 255),
    (255, 215, 0),
    (255, 90, 255),
    (0, 235, 235),
    (255, 145, 30),
    (170, 120, 255),
    (190, 255, 120),
    (255, 170, 190),
)
_GREY = (170, 170, 170)
_LABEL_WIDTH = 360  # pixels; labels on narrower pictures are not legible
_LABEL_SIZE = 14  # pixels


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
    labels_inside: bool = False,
) -> np.ndarray:
    """Draw boxes and their labels.

    Args:
        image: (H, W, 3) uint8 RGB. Small images are enlarged until labels are legible.
        boxes: (N, 4) half-open XYXY in pixels of ``image``.
        labels: N texts; empty ones are not drawn.
        colours: N RGB colours in 0-255.
        labels_inside: draw labels inside the boxes' corners, not above the boxes, for boxes that
            touch each other. A label that would cover another one goes to another corner.

    Returns:
        (H', W', 3) uint8 RGB; H' / H = W' / W is a whole number.
    """
    enlarge = -(-_LABEL_WIDTH // image.shape[1])
    picture = np.ascontiguousarray(image.repeat(enlarge, 0).repeat(enlarge, 1))
    height, width = picture.shape[:2]
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * enlarge
    # Lines stay inside the picture: 2 pixels of colour with a black edge of 1 pixel on both sides.
    low, high = [1, 1, 1, 1], [width - 3, height - 3, width - 3, height - 3]
    corners = np.clip(np.rint(corners - [0, 0, 1, 1]), low, high).astype(int).tolist()
    colours = [_BOX_COLOURS[0]] * len(corners) if colours is None else colours
    for colour_or_black, thickness in ((False, 4), (True, 2)):
        for (x0, y0, x1, y1), colour in zip(corners, colours, strict=True):
            line = colour if colour_or_black else (0, 0, 0)
            cv2.rectangle(picture, (x0, y0), (x1, y1), line, thickness)
    if labels is not None:
        taken = np.zeros((height, width), dtype=bool)
        for box, colour, label in zip(corners, colours, labels, strict=True):
            if label:
                _draw_label(picture, taken, box, colour, label, labels_inside)
    return picture


def _draw_label(
    picture: np.ndarray,
    taken: np.ndarray,
    box: Sequence[int],
    colour: tuple[int, int, int],
    text: str,
    inside: bool,
):
    """Draw a label at the corner of its box where it covers the least of ``taken``, and add it."""
    text = " ".join(text.split())
    font = _font(frozenset(text))
    width, height = round(font.getlength(text)) + 4, sum(font.getmetrics()) + 2
    x0, y0, x1, y1 = box
    rows = (y0, y1 - height) if inside else (y0 - height + 1, y1, y0)
    limit = np.maximum(0, np.subtract(taken.shape, (height, width)))
    places = []
    for start in itertools.product(rows, (x0, x1 - width)):
        top, left = np.clip(start, 0, limit)
        places.append((slice(top, top + height), slice(left, left + width)))
    place = min(places, key=lambda place: taken[place].sum())  # the first of equals
    taken[place] = True
    label = Image.new("RGB", (width, height), colour)
    ImageDraw.Draw(label).text((2, 1), text, (0, 0, 0), font)
    picture[place] = np.asarray(label)[: picture[place].shape[0], : picture[place].shape[1]]


@cache
def _font(characters: frozenset[str]) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, or an installed font that has the characters that it lacks."""
    from matplotlib import font_manager  # slow, and not needed without labels

    usual = font_manager.findfont("DejaVu Sans")
    installed = sorted(entry.fname for entry in font_manager.fontManager.ttflist)
    # Matplotlib's LastResort has a sign per script instead of the characters.
    for path in (usual, *(path for path in installed if "LastResort" not in path)):
        font = font_manager.get_font(path)
        if all(font.get_char_index(ord(character)) for character in characters):
            return ImageFont.truetype(path, _LABEL_SIZE)
    return ImageFont.truetype(usual, _LABEL_SIZE)


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    min_score: float = 0.5,
) -> np.ndarray:
    """Draw detections or ground truth; every class has one colour in all pictures.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) XYXY in pixels.
        classes: N indices into ``class_names``.
        class_names: names of the classes.
        scores: N confidences in [0, 1]; None for ground truth.
        min_score: detections with a lower score are not drawn.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    keep = [i for i in range(len(boxes)) if scores is None or scores[i] >= min_score]
    labels = [class_names[classes[i]] for i in keep]
    if scores is not None:
        labels = [f"{label} {scores[i]:.0%}" for i, label in zip(keep, labels, strict=True)]
    colours = [_BOX_COLOURS[classes[i] % len(_BOX_COLOURS)] for i in keep]
    return draw_boxes(image, boxes[keep], labels, colours)


def draw_regions(
    views: Sequence[tuple[np.ndarray, np.ndarray, Sequence[int]]], labels_inside: bool = False
) -> list[np.ndarray]:
    """Draw the regions of several views of one image; a region has one colour in all views.

    Args:
        views: for each view its (H, W, 3) uint8 RGB picture, boxes (K, 4) XYXY in its pixels, and K
            ids. Negative ids mark slots without a region, which are not drawn.
        labels_inside: see :func:`draw_boxes`.

    Returns:
        One (H', W', 3) uint8 RGB picture per view. Regions that are in one view only are grey.
    """
    seen = [set(int(i) for i in ids if i >= 0) for _, _, ids in views]
    everything = sorted(set().union(*seen))
    shared = [i for i in everything if sum(i in ids for ids in seen) > 1]
    colour = {i: _BOX_COLOURS[n % len(_BOX_COLOURS)] for n, i in enumerate(shared)}
    pictures = []
    for image, boxes, ids in views:
        drawn: dict[tuple, int] = {}  # box -> id; padding repeats boxes
        for box, i in zip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), ids, strict=True):
            if i >= 0:
                drawn[tuple(box)] = int(i)
        colours = [colour.get(i, _GREY) for i in drawn.values()]
        labels = [str(i) for i in drawn.values()]
        pictures.append(draw_boxes(image, np.array(list(drawn)), labels, colours, labels_inside))
    return pictures


def to_png(image: np.ndarray, max_width: int = 960) -> bytes:
    """Encode a picture, after shrinking it to a maximum width.

    Args:
        image: (H, W, 3) uint8 RGB.
        max_width: maximum width in pixels.

    Returns:
        PNG.
    """
    if image.shape[1] > max_width:
        height = round(image.shape[0] * max_width / image.shape[1])
        image = cv2.resize(image, (max_width, height), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
