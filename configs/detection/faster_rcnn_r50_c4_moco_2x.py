"""mask_rcnn_r50_c4_moco_2x.py without its mask head, for boxes without masks."""

from ..common.boxes_only import without_masks
from .mask_rcnn_r50_c4_moco_2x import dataloader, lr_multiplier, model, optimizer, train

without_masks(model, dataloader)
