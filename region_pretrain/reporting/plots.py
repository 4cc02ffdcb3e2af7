"""Diagrams as PNG, and boxes drawn on images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

#: A curve: x and y values of the same length.
Curve = tuple[Sequence[float], Sequence[float]]
_CURVE_COLOURS = colormaps["tab10"].colors
_LINE_STYLES = "-", "--", ":"  # of the first ten curves, the next ten, ...
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


def metric_curve(rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """One metric of a run by iteration; empty if the run has not logged it.

    Args:
        rows: lines of ``metrics.json``, from :func:`region_pretrain.metrics.read_metrics`.
        key: e.g. ``"total_loss"``, ``"bbox/AP"`` or ``"probe/knn_fpn"``.

    Returns:
        Numbers of finished iterations (1 after the first), and values.
    """
    rows = [row for row in rows if key in row]
    return [row["iteration"] + 1 for row in rows], [row[key] for row in rows]


def plot_curves(
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    log_x: bool = False,
) -> bytes:
    """Draw curves into one diagram, each with its own colour and legend entry.

    Args:
        curves: name -> curve; the legend marks empty ones as having no data.
        x_label: label of the x axis.
        y_label: label of the y axis.
        errors: name -> half the length of the error bar at each point.
        log_x: use a logarithmic x axis, with a tick at each x value. Points with error bars are
            drawn slightly beside it, so that the bars do not cover each other.

    Returns:
        PNG, 960 x 600 pixels.
    """
    figure, axes = _axes()
    labels = [literal(name if len(x) else f"{name} (no data)") for name, (x, _) in curves.items()]
    for i, (name, (x, y)) in enumerate(curves.items()):
        marker = "o" if len(x) <= 30 else None
        bars = (errors or {}).get(name)
        shift = 1.01 ** (i - (len(curves) - 1) / 2) if bars and log_x else 1
        axes.errorbar(
            [value * shift for value in x],
            y,
            bars,
            label=labels[i],
            color=_CURVE_COLOURS[i % len(_CURVE_COLOURS)],
            linestyle=_LINE_STYLES[i // len(_CURVE_COLOURS) % len(_LINE_STYLES)],
            marker=marker,
            markersize=4,
            capsize=3,
        )
    if log_x:
        ticks = sorted({value for x, _ in curves.values() for value in x})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if curves:
        columns = max(1, min(4, 110 // (max(map(len, labels)) + 8)))
        figure.legend(loc="outside upper center", ncols=columns)
    return _png(figure)


def plot_points(groups: Mapping[str, Sequence[float | None]], x_label: str) -> bytes:
    """Draw groups of values, one line of points each from top to bottom, with a tick at the mean.

    Args:
        groups: name -> values; None is not drawn, and such a group has no mean.
        x_label: label of the x axis.

    Returns:
        PNG, 960 x 600 pixels.
    """
    figure, axes = _axes()
    for i, all_values in enumerate(groups.values()):
        values = [value for value in all_values if value is not None]
        colour = _CURVE_COLOURS[i % len(_CURVE_COLOURS)]
        axes.plot(values, [i] * len(values), "o", color=colour, markersize=6, alpha=0.7)
        if len(values) == len(all_values):
            axes.plot(np.mean(values), i, "|", color="black", markersize=18, markeredgewidth=1.5)
    axes.set_yticks(range(len(groups)), [literal(name) for name in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    return _png(figure)


def literal(text: str) -> str:
    """A text for matplotlib, which would read dollar signs as mathematics and hide ``_names``."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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
            touch each other.

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
        for (x0, y0, _, _), colour, label in zip(corners, colours, labels, strict=True):
            if label:
                _draw_label(picture, x0, y0, colour, label, labels_inside)
    return picture


def _draw_label(
    picture: np.ndarray, x: int, y: int, colour: tuple[int, int, int], text: str, inside: bool
):
    text = " ".join(text.split())
    font = _font(frozenset(text))
    width, (above, below) = round(font.getlength(text)), font.getmetrics()
    height = above + below + 1
    x = max(0, min(x, picture.shape[1] - width - 4))
    top = y if inside else max(0, y - height)  # above the box if there is room
    cv2.rectangle(picture, (x, top), (x + width + 3, top + height), colour, cv2.FILLED)
    patch = picture[top : top + height + 1, x : x + width + 4]
    image = Image.fromarray(patch)
    ImageDraw.Draw(image).text((2, 1), text, (0, 0, 0), font)
    patch[:] = image


@cache
def _font(characters: frozenset[str]) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, or an installed font that has the characters that it lacks."""
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
