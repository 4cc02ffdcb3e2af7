"""The eight classes of Shapes, each a family of closed outlines of variable form.

An outline is a simple polygon ``(V, 2)`` float64 around the origin whose farthest vertex has
distance 1. Round parts are polygons of many vertices, so that the polygon *is* the object and its
mask and box are exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Outline = Callable[[np.random.Generator], np.ndarray]

_ROUND = 40  # vertices per full circle


def _arc(start: float, stop: float, vertices: int = _ROUND) -> np.ndarray:
    angle = np.linspace(start, stop, vertices)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def disc(rng: np.random.Generator) -> np.ndarray:
    """An ellipse."""
    full = _arc(0, 2 * np.pi, vertices=_ROUND + 1)[:-1]
    return full * (1.0, rng.uniform(0.62, 1.0))


def triangle(rng: np.random.Generator) -> np.ndarray:
    """A triangle whose corners move by up to 20 degrees."""
    angle = np.deg2rad([-90, 30, 150]) + rng.uniform(-0.35, 0.35, 3)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def box(rng: np.random.Generator) -> np.ndarray:
    """A rectangle, from a square to 1:2."""
    height = rng.uniform(0.5, 1.0)
    return np.array([(-1, -height), (1, -height), (1, height), (-1, height)])


def star(rng: np.random.Generator) -> np.ndarray:
    """A star with five to seven points."""
    points = int(rng.integers(5, 8))
    radius = np.tile((1.0, rng.uniform(0.40, 0.52)), points)
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def cross(rng: np.random.Generator) -> np.ndarray:
    """A plus sign with arms of equal width."""
    a, b = rng.uniform(0.24, 0.38), rng.uniform(0.75, 1.0)
    quarter = [(a, -a), (b, -a), (b, a), (a, a)]
    turn = np.array([(0, -1), (1, 0)])
    corners = [np.array(quarter)]
    for _ in range(3):
        corners.append(corners[-1] @ turn.T)
    return np.concatenate(corners)


def crescent(rng: np.random.Generator) -> np.ndarray:
    """A disc minus a disc of the same size: a moon."""
    shift = rng.uniform(0.55, 0.9)
    tip = np.arccos(shift / 2)  # where the two circles meet
    outer = _arc(tip, 2 * np.pi - tip)
    inner = _arc(np.pi + tip, np.pi - tip, vertices=_ROUND // 2) + (shift, 0)
    return np.concatenate([outer, inner[1:-1]])


def arrow(rng: np.random.Generator) -> np.ndarray:
    """A shaft with a head."""
    shaft, neck, barb = rng.uniform(0.16, 0.28), rng.uniform(-0.05, 0.25), rng.uniform(0.6, 0.85)
    return np.array(
        [(-1, -shaft), (neck, -shaft), (neck, -barb), (1, 0)]
        + [(neck, barb), (neck, shaft), (-1, shaft)]
    )


def heart(rng: np.random.Generator) -> np.ndarray:
    """The classical heart curve, more or less stretched."""
    t = np.linspace(0, 2 * np.pi, _ROUND + 1)[:-1]
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y * rng.uniform(0.85, 1.15)], axis=1) / 17


#: Class name -> family of outlines, in the order of the class ids.
OUTLINES: dict[str, Outline] = {
    f.__name__: f for f in (disc, triangle, box, star, cross, crescent, arrow, heart)
}


def sample_outline(name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw an outline of a class.

    Args:
        name: a key of :data:`OUTLINES`.
        rng: generator of the form.

    Returns:
        ``(V, 2)`` float64, centred on its bounding box, its farthest vertex at distance 1.
    """
    outline = OUTLINES[name](rng)
    outline = outline - (outline.min(axis=0) + outline.max(axis=0)) / 2
    return outline / np.linalg.norm(outline, axis=1).max()
