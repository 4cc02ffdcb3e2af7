"""Pictures of a generated data set's levels, and their command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import cv2
import numpy as np

from region_pretrain.errors import exit_on_user_error

#: Draws one scene, ``(H, W, 3)`` uint8 RGB, from its level, its index, the number of scenes per
#: level, and the side of a scene in pixels.
Draw = Callable[[str, int, int, int], np.ndarray]


@exit_on_user_error
def write_contact_sheet(description: str, output: str, levels: Iterable[str], draw: Draw) -> None:
    """Write scenes to an image file, one row per level, as the command line says.

    Args:
        description: of the command.
        output: default name of the file.
        levels: names of the levels.
        draw: draws a scene.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", default=output, help="image file (default %(default)s)")
    parser.add_argument(
        "--count", type=int, default=6, help="scenes per level (default %(default)s)"
    )
    parser.add_argument(
        "--side", type=int, default=128, help="side of a scene in pixels (default %(default)s)"
    )
    args = parser.parse_args()
    rows = []
    for level in levels:
        cells = [
            cv2.copyMakeBorder(
                draw(level, index, args.count, args.side),
                *(2, 2, 2, 2),
                cv2.BORDER_CONSTANT,
                value=(255,) * 3,
            )
            for index in range(args.count)
        ]
        row = np.hstack(cells)
        cv2.putText(row, level, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 0), 2)
        rows.append(row)
    cv2.imwrite(args.output, np.vstack(rows)[..., ::-1])
    print(args.output)
