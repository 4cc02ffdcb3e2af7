"""Draw Shapes at every level: ``python -m region_pretrain.data.shapes --output shapes.png``."""

from __future__ import annotations

import cv2
import numpy as np

from region_pretrain.data.contact_sheet import write_contact_sheet
from region_pretrain.data.shapes.dataset import ShapesSpec
from region_pretrain.data.shapes.scene import LEVELS, render_scene

_ZOOM = 2


def draw(level: str, index: int, count: int, side: int) -> np.ndarray:
    """A training scene; the second half of a row shows the visible outlines of the objects."""
    spec = ShapesSpec("train", count, side, difficulty=LEVELS[level])
    scene = render_scene(side, LEVELS[level], spec.rng(index))
    image = cv2.resize(scene.image, None, fx=_ZOOM, fy=_ZOOM, interpolation=cv2.INTER_NEAREST)
    if 2 * index >= count:
        for item in scene.objects:
            rings = [np.round(ring * _ZOOM).astype(np.int32) for ring in item.visible]
            cv2.polylines(image, rings, True, (255, 160, 0), 1, cv2.LINE_AA)
    return image


def main() -> None:
    write_contact_sheet(__doc__, "shapes.png", LEVELS, draw)


if __name__ == "__main__":
    main()
