"""Files to measure with, where the config's own data set is not at hand."""

from __future__ import annotations

import os

import cv2
import numpy as np

from region_pretrain.data.shapes.scene import get_difficulty, render_scene
from region_pretrain.errors import UserError
from region_pretrain.regions import write_store

#: As ImageNet's photographs are on average.
WIDTH, HEIGHT, BYTES = 500, 375, 80_000
_BOXES = 100


def make_jpegs(folder: str, count: int, seed: int = 0) -> tuple[str, str]:
    """Make JPEG files of 500 x 375 pixels and about 80 kB, with a store of random regions.

    Args:
        folder: gets ``images/`` and ``regions.arrow``.
        count: number of files.
        seed: of their content.

    Returns:
        The data set's name (``folder://...``) and the store's path.

    Raises:
        UserError: ``count`` is not positive.
    """
    if count < 1:
        raise UserError(f"--made-images {count}: at least 1")
    root = os.path.join(folder, "images")
    os.makedirs(root, exist_ok=True)
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = render_scene(WIDTH, get_difficulty("hard"), rng).image[:HEIGHT]
        noise = rng.normal(0, 12, scene.shape)  # grain, as sensors give
        pixels = np.clip(scene + noise, 0, 255).astype(np.uint8)
        name = f"{i:05d}.jpg"
        with open(os.path.join(root, name), "wb") as file:
            file.write(_encode(pixels))
        start = rng.uniform(0, (WIDTH - 16, HEIGHT - 16), (_BOXES, 2))
        stop = np.minimum(start + rng.uniform(16, 300, (_BOXES, 2)), (WIDTH, HEIGHT))
        boxes = np.concatenate([start, stop], axis=1).astype(np.float32)
        rows.append((name, WIDTH, HEIGHT, boxes))
    store = os.path.join(folder, "regions.arrow")
    write_store(store, rows, {"recipe": "benchmark"})
    return f"folder://{root}", store


def _encode(pixels: np.ndarray) -> bytes:
    """At the quality that comes closest to :data:`BYTES`."""
    low, high, best = 30, 98, b""
    while low <= high:
        quality = (low + high) // 2
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if not best or abs(len(data) - BYTES) < abs(len(best) - BYTES):
            best = data
        low, high = (quality + 1, high) if len(data) < BYTES else (low, quality - 1)
    return best
