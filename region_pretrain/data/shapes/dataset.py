"""Shapes as a generated data set, and its names in the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from region_pretrain.data.generated import SceneSpec, register_scenes
from region_pretrain.data.shapes.scene import CLASSES, Difficulty, get_difficulty, render_scene
from region_pretrain.registration import library_names


@dataclass(frozen=True)
class ShapesSpec(SceneSpec):
    """The parameters of a Shapes data set.

    Attributes:
        difficulty: see :class:`~region_pretrain.data.shapes.scene.Difficulty`.
    """

    difficulty: Difficulty = Difficulty()

    title: ClassVar[str] = "Shapes"
    version: ClassVar[int] = 1
    classes: ClassVar[tuple[str, ...]] = CLASSES
    extra_keys: ClassVar[tuple[str, ...]] = ("material_id", "visible")

    def draw(self, index: int) -> tuple[np.ndarray, list[dict]]:
        scene = render_scene(self.side, self.difficulty, self.rng(index))
        objects = []
        for item in scene.objects:
            x0, y0, x1, y1 = item.bbox
            objects.append(
                {
                    "category_id": item.category + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": item.area,
                    "segmentation": [ring.reshape(-1).tolist() for ring in item.visible],
                    "material_id": item.material,
                    "visible": item.area / item.polygon.area,
                }
            )
        return scene.image, objects


def shapes(
    split: str, size: int, side: int = 128, seed: int = 0, level: str = "medium", **difficulty
) -> str:
    """Register a Shapes data set and return its name, for use in a config.

    Example::

        dataloader.train.dataset.names = L(shapes)(split="train", size=200, level="hard", side=256)

    Args:
        split, size, side, seed: see :class:`~region_pretrain.data.generated.SceneSpec`.
        level: ``clear``, ``easy``, ``medium`` or ``hard``.
        **difficulty: fields of :class:`~region_pretrain.data.shapes.scene.Difficulty` to override.

    Returns:
        The registered name.
    """
    return register_scenes(ShapesSpec(split, size, side, seed, get_difficulty(level, **difficulty)))


for _split, _size in (("unlabeled", 2000), ("train", 200), ("val", 200)):
    library_names.add(register_scenes(ShapesSpec(_split, _size), f"shapes_{_split}"))
