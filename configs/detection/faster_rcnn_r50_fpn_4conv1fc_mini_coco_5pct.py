"""mask_rcnn_r50_fpn_4conv1fc_mini_coco_5pct.py without its mask head, for boxes without masks."""

from ..common.boxes_only import without_masks
from .mask_rcnn_r50_fpn_4conv1fc_mini_coco_5pct import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

without_masks(model, dataloader)
