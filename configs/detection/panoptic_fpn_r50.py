"""Panoptic FPN R50, COCO 1x: Detectron2's panoptic_fpn_R_50_1x.py with SyncBN in trunk and FPN."""

from ..common.data.coco_panoptic import dataloader
from ..common.models.from_zoo import from_zoo
from .mask_rcnn_r50_fpn_moco import lr_multiplier, optimizer, train

model = from_zoo("panoptic_fpn")
