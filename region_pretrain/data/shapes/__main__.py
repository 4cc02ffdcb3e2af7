"""Draw Shapes at every level: ``python -m region_pretrain.data.shapes --output shapes.png``."""

from __future__ import annotations

import argparse

import cv2
import numpy as np

from region_pretrain.data.shapes.dataset import ShapesSpec
from region_pretrain.data.shapes.scene import LEVELS, render_scene


def contact_sheet(count: int, side: int) -> np.ndarray:
    """Draw scenes of the training split, one row per level.

    Args:
        count: scenes per level.
        side: side of a scene in pixels.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    zoom = 2
    rows = []
    for level, difficulty in LEVELS.items():
        cells = []
        for index in range(count):
            spec = ShapesSpec("train", count, side, difficulty=difficulty)
            scene = render_scene(side, difficulty, spec.rng(index))
            cell = cv2.resize(scene.image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
            if 2 * index >= count:  # the second half shows the visible outlines of the objects
                for item in scene.objects:
                    rings = [np.round(ring * zoom).astype(np.int32) for ring in item.visible]
                    cv2.polylines(cell, rings, True, (255, 160, 0), 1, cv2.LINE_AA)
            cells.append(
                cv2.copyMakeBorder(cell, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255,) * 3)
            )
        row = np.hstack(cells)
        cv2.putText(row, level, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 0), 2)
        rows.append(row)
    return np.vstack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="shapes.png", help="PNG file (default %(default)s)")
    parser.add_argument(
        "--count", type=int, default=6, help="scenes per level (default %(default)s)"
    )
    parser.add_argument(
        "--side", type=int, default=128, help="side of a scene in pixels (default %(default)s)"
    )
    args = parser.parse_args()
    cv2.imwrite(args.output, contact_sheet(args.count, args.side)[..., ::-1])
    print(args.output)


if __name__ == "__main__":
    main()
