"""Emoji as a generated data set, and its names in the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pycocotools import mask as mask_util

from region_pretrain.data.emoji.scene import (
    Difficulty,
    get_difficulty,
    photographs,
    render_scene,
)
from region_pretrain.data.emoji.vendors import CLASSES, VENDORS, drawings
from region_pretrain.data.generated import SceneSpec, register_scenes
from region_pretrain.registration import library_names

#: Split -> vendors. The drawings of the validation split are never seen in training.
SPLIT_VENDORS: dict[str, tuple[str, ...]] = {
    "unlabeled": ("noto", "fluent", "openmoji"),
    "train": ("noto", "fluent", "openmoji"),
    "val": ("twemoji",),
}


@dataclass(frozen=True)
class EmojiSpec(SceneSpec):
    """The parameters of an emoji data set.

    Attributes:
        difficulty: see :class:`~region_pretrain.data.emoji.scene.Difficulty`.
    """

    difficulty: Difficulty = Difficulty()

    title: ClassVar[str] = "Emoji"
    version: ClassVar[int] = 1  # also increment it when a vendor's package changes
    classes: ClassVar[tuple[str, ...]] = CLASSES
    extra_keys: ClassVar[tuple[str, ...]] = ("vendor_id", "visible")

    def prepare(self) -> None:
        photographs()
        for vendor in SPLIT_VENDORS[self.split]:
            drawings(vendor)

    def draw(self, index: int) -> tuple[np.ndarray, list[dict]]:
        vendors = SPLIT_VENDORS[self.split]
        scene = render_scene(self.side, self.difficulty, vendors, self.rng(index))
        objects = []
        for item in scene.objects:
            x0, y0, x1, y1 = item.bbox
            rle = mask_util.encode(np.asfortranarray(item.visible, np.uint8))
            objects.append(
                {
                    "category_id": item.category + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": item.area,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "vendor_id": list(VENDORS).index(item.vendor),
                    "visible": item.area / item.full_area,
                }
            )
        return scene.image, objects


def emoji(
    split: str, size: int, side: int = 128, seed: int = 0, level: str = "medium", **difficulty
) -> str:
    """Register an emoji data set and return its name, for use in a config.

    Example::

        dataloader.train.dataset.names = L(emoji)(split="train", size=200, level="hard", side=256)

    Args:
        split, size, side, seed: see :class:`~region_pretrain.data.generated.SceneSpec`.
        level: ``easy``, ``medium`` or ``hard``.
        **difficulty: fields of :class:`~region_pretrain.data.emoji.scene.Difficulty` to override.

    Returns:
        The registered name.
    """
    return register_scenes(EmojiSpec(split, size, side, seed, get_difficulty(level, **difficulty)))


for _split, _size in (("unlabeled", 2000), ("train", 200), ("val", 200)):
    library_names.add(register_scenes(EmojiSpec(_split, _size), f"emoji_{_split}"))
