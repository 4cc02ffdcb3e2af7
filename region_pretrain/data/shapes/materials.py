"""The materials of Shapes: eight grey textures that differ in statistics, not in colour.

A material is a function ``(height, width, scale, rng) -> (height, width)`` float32 with zero mean
and unit standard deviation. ``scale`` is the texture's unit length in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Material = Callable[[int, int, float, np.random.Generator], np.ndarray]


def _standardise(field: np.ndarray) -> np.ndarray:
    field = field - field.mean()
    return (field / max(float(field.std()), 1e-6)).astype(np.float32)


def _axes(
    height: int, width: int, period: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two perpendicular phases (radians) in a random direction, each with the given period."""
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return u * (2 * np.pi / period) + phase[0], v * (2 * np.pi / period) + phase[1]


def _noise(height: int, width: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of correlation length ``sigma`` pixels, without border effects."""
    pad = int(np.ceil(3 * sigma))
    white = rng.standard_normal((height + 2 * pad, width + 2 * pad), dtype=np.float32)
    smooth = cv2.GaussianBlur(white, (0, 0), sigma) if sigma > 0 else white
    return _standardise(smooth[pad : pad + height, pad : pad + width])


def clouds(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth, without orientation."""
    return _noise(height, width, scale, rng)


def stripes(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Straight soft-edged bars."""
    u, _ = _axes(height, width, 1.6 * scale, rng)
    return _standardise(np.tanh(3 * np.sin(u)))


def checker(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """A chessboard."""
    u, v = _axes(height, width, 2.4 * scale, rng)
    return _standardise(np.tanh(6 * np.sin(u) * np.sin(v)))


def dots(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Bright dots on a square lattice."""
    u, v = _axes(height, width, 2.2 * scale, rng)
    return _standardise(np.exp(2.5 * (np.cos(u) + np.cos(v) - 2)))


def grain(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Fine noise."""
    return _noise(height, width, 0.22 * scale, rng)


def waves(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Bars bent by a slow distortion, like wood grain."""
    u, _ = _axes(height, width, 2.4 * scale, rng)
    return _standardise(np.sin(u + 2.5 * _noise(height, width, 1.8 * scale, rng)))


def cracks(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Thin dark lines between plates."""
    return _standardise(-np.exp(-4 * np.abs(_noise(height, width, 0.9 * scale, rng))))


def weave(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Thin crossing threads."""
    u, v = _axes(height, width, 1.9 * scale, rng)
    return _standardise(np.maximum(np.cos(u) ** 5, np.cos(v) ** 5))


#: Material name -> function, in the order of the class ids: material i is typical of class i.
MATERIALS: dict[str, Material] = {
    f.__name__: f for f in (clouds, stripes, checker, dots, grain, waves, cracks, weave)
}
