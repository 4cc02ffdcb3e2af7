"""Draw emoji scenes at every level: ``python -m region_pretrain.data.emoji --output emoji.jpg``."""

from __future__ import annotations

import cv2
import numpy as np

from region_pretrain.data.contact_sheet import write_contact_sheet
from region_pretrain.data.emoji.dataset import SPLIT_VENDORS, EmojiSpec
from region_pretrain.data.emoji.scene import LEVELS, render_scene


def draw(level: str, index: int, count: int, side: int) -> np.ndarray:
    """The first half of a row are training scenes; every second shows the visible outlines."""
    split = "train" if 2 * index < count else "val"
    spec = EmojiSpec(split, count, side, difficulty=LEVELS[level])
    scene = render_scene(side, LEVELS[level], SPLIT_VENDORS[split], spec.rng(index))
    image = np.ascontiguousarray(scene.image)
    if index % 2:
        for item in scene.objects:
            mask = item.visible.astype(np.uint8)
            rings, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.polylines(image, rings, True, (255, 255, 0), 1)
    return image


def main() -> None:
    write_contact_sheet(__doc__, "emoji.jpg", LEVELS, draw)


if __name__ == "__main__":
    main()
