"""mask_rcnn_r18_fpn_shapes.py without its mask head, for boxes without masks."""

from ..common.boxes_only import without_masks
from .mask_rcnn_r18_fpn_shapes import dataloader, lr_multiplier, model, optimizer, train

without_masks(model, dataloader)
train.output_dir = "output/faster_rcnn_r18_fpn_shapes"
