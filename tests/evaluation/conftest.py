"""A small labelled data set, whose classes are colours; puts ``zoo`` on the path."""

import copy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

sys.path.insert(0, str(Path(__file__).parents[1] / "yacs"))

COLOURS = [(220, 40, 40), (40, 200, 60), (50, 70, 230)]


@pytest.fixture(scope="module")
def dicts(tmp_path_factory):
    """10 images of 2 or 3 coloured rectangles: the class is the colour."""
    folder = tmp_path_factory.mktemp("rectangles")
    rng = np.random.default_rng(0)
    records = []
    for i in range(10):
        height, width = 60 + 4 * (i % 3), 90
        image = rng.integers(90, 130, (height, width, 3)).astype(np.uint8)
        annotations = []
        for j in range(2 + i % 2):
            x, y, w, h = 3 + 29 * j, int(rng.integers(2, 20)), 24, int(rng.integers(20, 36))
            label = int(rng.integers(3))
            image[y : y + h, x : x + w] = COLOURS[label]
            # floats, as in COCO: Detectron2 truncates the corners of resized integer boxes
            bbox = [float(v) for v in (x, y, w, h)]
            box = {"bbox": bbox, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label}
            mask = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append({**box, "iscrowd": 0, "segmentation": mask})
        crowd = {"bbox": [0, 0, 90, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        annotations.append({**crowd, "iscrowd": 1, "segmentation": []})
        path = folder / f"{i}.png"
        cv2.imwrite(str(path), image[..., ::-1])
        records.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    return records


@pytest.fixture
def names(dicts):
    DatasetCatalog.register("probe_train", lambda: copy.deepcopy(dicts[:6]))
    DatasetCatalog.register("probe_val", lambda: copy.deepcopy(dicts[6:]))
    DatasetCatalog.register("probe_all", lambda: copy.deepcopy(dicts))
    yield "probe_train", "probe_val"
    for name in ("probe_train", "probe_val", "probe_all"):
        DatasetCatalog.remove(name)
