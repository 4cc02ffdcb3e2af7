"""mask_rcnn_r50_fpn_moco.py with the 2x schedule."""

from ..common.schedule import detection_2x as lr_multiplier
from .mask_rcnn_r50_fpn_moco import dataloader, model, optimizer, train

train.max_iter = 180_000
