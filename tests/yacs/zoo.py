"""Configs of Detectron2's model zoo, shrunk for tests, and a COCO data set made up for them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

#: Narrow networks, by keys that every config has.
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS=8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS=16",
    "MODEL.RESNETS.WIDTH_PER_GROUP=4",
    "MODEL.FPN.OUT_CHANNELS=16",
    "MODEL.ROI_BOX_HEAD.FC_DIM=24",
    "MODEL.ROI_BOX_HEAD.CONV_DIM=16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM=8",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS=(8,8)",
]
#: Small images, few proposals.
SMALL = [
    *NARROW,
    "INPUT.MIN_SIZE_TRAIN=(48,64)",
    "INPUT.MIN_SIZE_TEST=64",
    "MODEL.ROI_HEADS.NUM_CLASSES=3",
    "MODEL.RETINANET.NUM_CLASSES=3",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN=50",
    "MODEL.RPN.POST_NMS_TOPK_TEST=20",
    "DATALOADER.NUM_WORKERS=0",
    "SOLVER.IMS_PER_BATCH=2",
    "MODEL.WEIGHTS=",
]
TRAINABLE = [
    "MODEL.BACKBONE.FREEZE_AT=0",
    "MODEL.RESNETS.NORM=SyncBN",
    "MODEL.FPN.NORM=SyncBN",
]
KEYPOINTS = ["nose", "left_ear", "right_ear"]


def register_coco(name: str, folder: Path, images: int = 6) -> str:
    """Write and register a COCO data set of 3 classes with polygons and 3 keypoints."""
    rng = np.random.default_rng(0)
    data = {"images": [], "annotations": [], "categories": []}
    for i in range(images):
        size = (64, 80) if i % 2 else (80, 64)  # height, width
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (*size, 3), np.uint8))
        data["images"].append(
            {"id": i, "file_name": f"{i}.png", "height": size[0], "width": size[1]}
        )
        x, y, w, h = 8 + i, 10, 30, 36
        data["annotations"].append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": i % 3 + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "keypoints": [x + 5, y + 5, 2, x + 1, y + 9, 2, x + 9, y + 9, 1],
                "num_keypoints": 3,
            }
        )
    for i, category in enumerate(["a", "b", "c"]):
        data["categories"].append({"id": i + 1, "name": category, "keypoints": KEYPOINTS})
    (folder / "coco.json").write_text(json.dumps(data))
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    flips = [("left_ear", "right_ear")]
    meta = {"keypoint_names": KEYPOINTS, "keypoint_flip_map": flips}
    register_coco_instances(name, meta, str(folder / "coco.json"), str(folder))
    return name
