"""Shapes: the built-in procedural data set, generated from a seed."""

from region_pretrain.data.shapes.dataset import ShapesSpec, shapes
from region_pretrain.data.shapes.scene import (
    CLASSES,
    LEVELS,
    Difficulty,
    get_difficulty,
    render_scene,
)

__all__ = [
    "CLASSES",
    "LEVELS",
    "Difficulty",
    "ShapesSpec",
    "get_difficulty",
    "render_scene",
    "shapes",
]
