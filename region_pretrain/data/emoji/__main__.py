"""Draw emoji scenes at every level: ``python -m region_pretrain.data.emoji --output emoji.jpg``."""

from __future__ import annotations

import argparse

import cv2
import numpy as np

from region_pretrain.data.emoji.dataset import SPLIT_VENDORS, EmojiSpec
from region_pretrain.data.emoji.scene import LEVELS, render_scene
from region_pretrain.errors import exit_on_user_error


def contact_sheet(count: int, side: int) -> np.ndarray:
    """Draw scenes, one row per level: the first half for training, the second for validation.

    Args:
        count: scenes per level.
        side: side of a scene in pixels.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    rows = []
    for level, difficulty in LEVELS.items():
        cells = []
        for index in range(count):
            split = "train" if 2 * index < count else "val"
            spec = EmojiSpec(split, count, side, difficulty=difficulty)
            scene = render_scene(side, difficulty, SPLIT_VENDORS[split], spec.rng(index))
            cell = np.ascontiguousarray(scene.image)
            if index % 2:  # every second scene shows the visible outlines of the objects
                for item in scene.objects:
                    rings, _ = cv2.findContours(
                        item.visible.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
                    )
                    cv2.polylines(cell, rings, True, (255, 255, 0), 1)
            cells.append(
                cv2.copyMakeBorder(cell, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255,) * 3)
            )
        row = np.hstack(cells)
        cv2.putText(row, level, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 0), 2)
        rows.append(row)
    return np.vstack(rows)


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="emoji.jpg", help="image file (default %(default)s)")
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
