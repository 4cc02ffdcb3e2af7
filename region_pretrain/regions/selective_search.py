"""Selective search (Uijlings et al. 2013) from OpenCV's ximgproc, made deterministic."""

from __future__ import annotations

import cv2
import numpy as np

from region_pretrain.regions.filters import canonical, clip

_SWITCHES = {
    "fast": "switchToSelectiveSearchFast",
    "quality": "switchToSelectiveSearchQuality",
    "single": "switchToSingleStrategy",
}
MODES = tuple(_SWITCHES)


def selective_search(image: np.ndarray, mode: str = "fast", working_size: int = 0) -> np.ndarray:
    """The boxes of selective search, unfiltered.

    OpenCV returns the same boxes in every run and with any number of threads, but in a partly
    random order; here the order is fixed.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        mode: one of :data:`MODES`, each with OpenCV's default parameters.
        working_size: a larger image is downscaled to this long side before the search, whose time
            is roughly proportional to the pixels, and the boxes are mapped back; 0 is full size.

    Returns:
        ``(N, 4)`` float32 XYXY, half-open whole pixels of ``image``, sorted by area.
    """
    height, width = image.shape[:2]
    scale = working_size / max(height, width) if working_size else 1.0
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[..., ::-1]))  # BGR
    getattr(search, _SWITCHES[mode])()
    boxes = np.asarray(search.process(), np.float64).reshape(-1, 4)  # x, y, width, height
    boxes[:, 2:] += boxes[:, :2]
    shrunk_height, shrunk_width = image.shape[:2]
    boxes *= (width / shrunk_width, height / shrunk_height) * 2
    return canonical(clip(np.rint(boxes), width, height))
