"""Synthetic JPEG files, for measurements without the config's data set."""

from __future__ import annotations

import os

import cv2
import numpy as np

from region_pretrain.data.shapes.scene import get_difficulty, render_scene
from region_pretrain.errors import UserError
from region_pretrain.regions import write_store

#: Width and height of the average ImageNet photograph in pixels.
SIZE = (500, 375)
_BYTES_PER_PIXEL = 80_000 / (500 * 375)  # of the same photograph
_MIN_SIDE = 64
_BOXES_PER_IMAGE = 100


def make_jpegs(folder: str, count: int, size: tuple[int, int] = SIZE) -> tuple[str, str]:
    """Write JPEG files of 0.43 bytes per pixel, and a store of random regions.

    Args:
        folder: folder for ``images/`` and ``regions.arrow``.
        count: number of files.
        size: ``(width, height)`` of the images in pixels; files of the default size have 80 kB.

    Returns:
        The data set's name (``folder://...``) and the store's path.

    Raises:
        UserError: ``count`` is not positive, or a side is below 64 pixels.
    """
    if count < 1:
        raise UserError(f"--synthetic-images {count}: must be at least 1")
    width, height = size
    if min(size) < _MIN_SIDE:
        raise UserError(
            f"--synthetic-size {width}x{height}: sides must be at least {_MIN_SIDE} pixels"
        )
    root = os.path.join(folder, "images")
    os.makedirs(root, exist_ok=True)
    rows = []
    for i in range(count):
        rng = np.random.default_rng([0, i])
        scene = render_scene(SIZE[0], get_difficulty("hard"), rng).image
        if max(size) != SIZE[0]:  # rendering large scenes takes minutes
            scene = cv2.resize(scene, (max(size), max(size)), interpolation=cv2.INTER_CUBIC)
        scene = scene[:height, :width]
        noise = rng.normal(0, 12, scene.shape)  # sensor noise
        pixels = np.clip(scene + noise, 0, 255).astype(np.uint8)
        name = f"{i:05d}.jpg"
        with open(os.path.join(root, name), "wb") as file:
            file.write(_encode(pixels, round(_BYTES_PER_PIXEL * width * height)))
        start = rng.uniform(0, (width - 16, height - 16), (_BOXES_PER_IMAGE, 2))
        stop = np.minimum(start + rng.uniform(16, 0.6 * max(size), (_BOXES_PER_IMAGE, 2)), size)
        boxes = np.concatenate([start, stop], axis=1).astype(np.float32)
        rows.append((name, width, height, boxes))
    store = os.path.join(folder, "regions.arrow")
    write_store(store, rows, {"recipe": "benchmark"})
    return f"folder://{root}", store


def _encode(pixels: np.ndarray, target: int) -> bytes:
    """Encode as JPEG with the quality whose file size is closest to ``target`` bytes."""
    low, high, best = 30, 98, b""
    while low <= high:
        quality = (low + high) // 2
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if not best or abs(len(data) - target) < abs(len(best) - target):
            best = data
        low, high = (quality + 1, high) if len(data) < target else (low, quality - 1)
    return best
