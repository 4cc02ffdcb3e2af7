"""PNG label maps: each label is one region."""

from __future__ import annotations

import numpy as np
from detectron2.utils.file_io import PathManager

from region_pretrain.images.pillow import open_with_pillow
from region_pretrain.regions.elsewhere.table import BoxTable, errors_name

_MOST_LABELS = 5000
_GREY = ("1", "L", "P", "I", "I;16", "I;16B")


def read_label_map(path: str, with_zero: bool = False) -> BoxTable:
    """The boxes around the labels of a PNG.

    Args:
        path: the file. The values of a grey image or of a palette are the labels; in RGB a label is
            R + 256 G + 256 * 256 B, as in COCO's panoptic format.
        with_zero: label 0 is a region too; otherwise it is background.

    Returns:
        A table of one image, without a name of its own.

    Raises:
        UserError: the file is damaged or has other pixels.
    """
    with errors_name(path, "a PNG label map"):
        with open(PathManager.get_local_path(path), "rb") as file:
            data = file.read()
        with open_with_pillow(data, path) as image:
            if image.format != "PNG":
                raise ValueError("it is not a PNG")
            if image.mode not in (*_GREY, "RGB"):
                raise ValueError(f"its pixels are {image.mode}: must be grey, palette or RGB")
            labels = np.asarray(image)
        if labels.ndim == 3:
            labels = labels.astype(np.int64) @ (1, 256, 256 * 256)
        height, width = labels.shape
        boxes = label_boxes(labels, with_zero)
        if len(boxes) > _MOST_LABELS:
            raise ValueError(f"it has {len(boxes)} labels, like a photograph")
        rows = np.zeros(len(boxes), np.int64)
        return BoxTable.of([""], False, rows, boxes, None, {"": (width, height)})


def label_boxes(labels: np.ndarray, with_zero: bool = False) -> np.ndarray:
    """The boxes around the labels of a map.

    Args:
        labels: ``(H, W)`` integers.
        with_zero: see :func:`read_label_map`.

    Returns:
        ``(N, 4)`` int64 XYXY, half-open, in the order of the labels.
    """
    from scipy.ndimage import find_objects  # slow; every training imports this module

    values, index = np.unique(labels, return_inverse=True)
    places = find_objects(index.reshape(labels.shape).astype(np.int32) + 1)
    boxes = np.array([[x.start, y.start, x.stop, y.stop] for y, x in places], np.int64)
    return boxes if with_zero else boxes[values != 0]
