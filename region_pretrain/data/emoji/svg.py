"""Rasterise SVG drawings that consist of solid fills and round strokes.

SVG libraries draw slightly different pixels in each version. Here a pixel's coverage is counted
from the path's winding number at 4x4 points, so that the same drawing is the same everywhere.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import numpy as np
import shapely
from fontTools.misc.transform import Identity, Transform
from fontTools.pens.basePen import BasePen
from fontTools.svgLib.path import parse_path
from fontTools.svgLib.path.shapes import PathBuilder
from PIL import ImageColor

_SAMPLES = 4  # per pixel and axis
_CURVE = np.linspace(0, 1, 17)[1:, None]  # a Bezier curve becomes 16 lines
_STYLE = {"fill": "#000", "stroke": "none", "stroke-width": "1", "fill-rule": "nonzero"}


class _Polylines(BasePen):
    """Collect the contours of a path as lists of points, and which of them are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.contours: list[list[tuple[float, float]]] = []
        self.closed: list[bool] = []

    def _moveTo(self, point: tuple[float, float]) -> None:
        self.contours.append([point])
        self.closed.append(False)

    def _lineTo(self, point: tuple[float, float]) -> None:
        self.contours[-1].append(point)

    def _curveToOne(self, *points: tuple[float, float]) -> None:
        p0, p1, p2, p3 = np.array([self.contours[-1][-1], *points])
        t, s = _CURVE, 1 - _CURVE
        curve = s**3 * p0 + 3 * s * s * t * p1 + 3 * s * t * t * p2 + t**3 * p3
        self.contours[-1].extend(map(tuple, curve.tolist()))

    def _closePath(self) -> None:
        self.closed[-1] = True


def fill_coverage(contours: list[np.ndarray], side: int, even_odd: bool = False) -> np.ndarray:
    """The fraction of each pixel that a path covers, in steps of 1/16.

    Args:
        contours: closed contours ``(V, 2)`` in pixels.
        side: side of the image in pixels.
        even_odd: the fill rule is ``evenodd``, not ``nonzero``.

    Returns:
        ``(side, side)`` float64.
    """
    grid = side * _SAMPLES
    winding = np.zeros((grid, grid + 1), np.int32)
    start = np.concatenate(contours) * _SAMPLES
    stop = np.concatenate([np.roll(c, -1, axis=0) for c in contours]) * _SAMPLES
    # Sample i is at i + 0.5. An edge crosses the rows of samples from ``first`` up to ``last``.
    sign = np.where(start[:, 1] < stop[:, 1], 1, -1)
    low, high = np.minimum(start[:, 1], stop[:, 1]), np.maximum(start[:, 1], stop[:, 1])
    first = np.clip(np.ceil(low - 0.5), 0, grid).astype(int)
    last = np.clip(np.ceil(high - 0.5), 0, grid).astype(int)
    edge = np.repeat(np.arange(len(start)), last - first)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
    (x0, y0), (x1, y1) = start[edge].T, stop[edge].T
    x = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    column = np.clip(np.ceil(x - 0.5), 0, grid).astype(int)
    np.add.at(winding, (row, column), sign[edge])
    winding = winding.cumsum(axis=1)[:, :-1]
    inside = winding % 2 == 1 if even_odd else winding != 0
    return inside.reshape(side, _SAMPLES, side, _SAMPLES).mean(axis=(1, 3))


def _transform(text: str) -> Transform:
    """An SVG ``transform`` of matrices, translations and scalings."""
    result = Identity
    for name, arguments in re.findall(r"(\w+)\(([^)]*)\)", text):
        values = [float(v) for v in re.split(r"[\s,]+", arguments.strip())]
        if name == "matrix":
            result = result.transform(values)
        else:
            result = {"translate": result.translate, "scale": result.scale}[name](*values)
    return result


def _elements(
    node: ElementTree.Element, style: dict[str, str], transform: Transform
) -> Iterator[tuple[ElementTree.Element, dict[str, str], Transform]]:
    """The shapes of a drawing from back to front, with inherited style and transform."""
    style = {k: node.attrib.get(k, v) for k, v in style.items()}
    transform = transform.transform(_transform(node.attrib.pop("transform", "")))
    yield node, style, transform
    for child in node:
        yield from _elements(child, style, transform)


def _stroke(lines: _Polylines, width: float) -> list[np.ndarray]:
    """The outline of a stroke with round caps and joins, as contours for the even-odd rule."""
    shapes = []
    for points, closed in zip(lines.contours, lines.closed, strict=True):
        points = points + points[:1] if closed or len(points) == 1 else points
        shapes.append(shapely.LineString(points).buffer(width / 2))
    union = shapely.union_all(shapes)
    polygons = [p for p in getattr(union, "geoms", [union]) if not p.is_empty]
    rings = [ring for p in polygons for ring in (p.exterior, *p.interiors)]
    return [np.asarray(ring.coords)[:-1] for ring in rings]


def rasterise(svg: str, side: int) -> np.ndarray:
    """Draw an SVG.

    Args:
        svg: the document. It has a square ``viewBox`` and neither gradients nor opacities.
        side: side of the picture in pixels.

    Returns:
        ``(side, side, 4)`` uint8 RGBA, not premultiplied.
    """
    root = ElementTree.fromstring(svg)
    x, y, width, _ = map(float, root.attrib["viewBox"].split())
    to_pixels = Identity.scale(side / width).translate(-x, -y)
    canvas = np.zeros((side, side, 4))  # premultiplied
    for element, style, transform in _elements(root, _STYLE, to_pixels):
        builder = PathBuilder()
        if not builder.add_path_from_element(element):
            continue
        lines = _Polylines()
        for path in builder.paths:
            parse_path(path, lines)
        if not lines.contours:
            continue
        fill = [np.array(c) for c in lines.contours], style["fill-rule"] == "evenodd"
        stroke = (_stroke(lines, width), True) if (width := float(style["stroke-width"])) else None
        for part, colour in ((fill, style["fill"]), (stroke, style["stroke"])):
            if part is None or colour == "none":
                continue
            contours = [np.array(transform.transformPoints(c)) for c in part[0]]
            alpha = fill_coverage(contours, side, part[1])[..., None]
            paint = np.array([*ImageColor.getrgb(colour)[:3], 255])
            canvas += alpha * (paint - canvas)
    opaque = np.maximum(canvas[..., 3:], 1e-9) / 255
    canvas[..., :3] /= opaque
    return np.floor(np.clip(canvas, 0, 255) + 0.5).astype(np.uint8)
