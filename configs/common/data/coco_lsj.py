"""COCO 2017 with masks, RGB: large-scale jitter to 1024 x 1024 in training, 1024 in testing.

ViTDet, appendix A.2: images are resized by 0.1 to 2.0 and cropped; the model pads them.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .coco import dataloader

_SIDE = 1024
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=_SIDE, target_width=_SIDE),
    L(T.FixedSizeCrop)(crop_size=(_SIDE, _SIDE), pad=False),
]
dataloader.train.mapper.recompute_boxes = True  # of the cropped masks
dataloader.train.total_batch_size = 64
dataloader.test.mapper.augmentations[0].update(short_edge_length=_SIDE, max_size=_SIDE)
