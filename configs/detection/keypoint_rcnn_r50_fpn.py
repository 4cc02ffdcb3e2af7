"""Keypoint R-CNN R50-FPN, COCO persons, 1x: SyncBN in trunk and FPN."""

from ..common.data.coco_keypoints import dataloader
from ..common.models.from_zoo import from_zoo
from .mask_rcnn_r50_fpn_moco import lr_multiplier, optimizer, train

model = from_zoo("keypoint_rcnn_fpn")
