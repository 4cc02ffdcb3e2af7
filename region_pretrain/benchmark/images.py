"""Files to measure with, where the config's own data set is not at hand."""

from __future__ import annotations

import os

import cv2
import numpy as np

from region_pretrain.data.shapes.scene import get_difficulty, render_scene
from region_pretrain.errors import UserError
from region_pretrain.regions import write_store

#: As ImageNet's photographs are on average.
SIZE = (500, 375)
BYTES_A_PIXEL = 80_000 / (500 * 375)
_LEAST_SIDE = 64
_BOXES = 100


def make_jpegs(
    folder: str, count: int, size: tuple[int, int] = SIZE, seed: int = 0
) -> tuple[str, str]:
    """Make JPEG files of 0.43 bytes a pixel, with a store of random regions.

    Args:
        folder: gets ``images/`` and ``regions.arrow``.
        count: number of files.
        size: ``(width, height)`` of each in pixels. The default makes about 80 kB.
        seed: of their content.

    Returns:
        The data set's name (``folder://...``) and the store's path.

    Raises:
        UserError: ``count`` is not positive, or a side is below 64 pixels.
    """
    if count < 1:
        raise UserError(f"--made-images {count}: at least 1")
    width, height = size
    if min(size) < _LEAST_SIDE:
        raise UserError(f"--made-size {width}x{height}: at least {_LEAST_SIDE} pixels a side")
    root = os.path.join(folder, "images")
    os.makedirs(root, exist_ok=True)
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = render_scene(SIZE[0], get_difficulty("hard"), rng).image
        if max(size) != SIZE[0]:  # scenes of thousands of pixels take minutes to draw
            scene = cv2.resize(scene, (max(size), max(size)), interpolation=cv2.INTER_CUBIC)
        scene = scene[:height, :width]
        noise = rng.normal(0, 12, scene.shape)  # grain, as sensors give
        pixels = np.clip(scene + noise, 0, 255).astype(np.uint8)
        name = f"{i:05d}.jpg"
        with open(os.path.join(root, name), "wb") as file:
            file.write(_encode(pixels, round(BYTES_A_PIXEL * width * height)))
        start = rng.uniform(0, (width - 16, height - 16), (_BOXES, 2))
        stop = np.minimum(start + rng.uniform(16, 0.6 * max(size), (_BOXES, 2)), size)
        boxes = np.concatenate([start, stop], axis=1).astype(np.float32)
        rows.append((name, width, height, boxes))
    store = os.path.join(folder, "regions.arrow")
    write_store(store, rows, {"recipe": "benchmark"})
    return f"folder://{root}", store


def _encode(pixels: np.ndarray, wanted: int) -> bytes:
    """At the quality that comes closest to so many bytes."""
    low, high, best = 30, 98, b""
    while low <= high:
        quality = (low + high) // 2
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if not best or abs(len(data) - wanted) < abs(len(best) - wanted):
            best = data
        low, high = (quality + 1, high) if len(data) < wanted else (low, quality - 1)
    return best
