"""mask_rcnn_r50_fpn_4conv1fc.py with the 3x schedule."""

from ..common.schedule import detection_3x as lr_multiplier
from .mask_rcnn_r50_fpn_4conv1fc import dataloader, model, optimizer, train

train.max_iter = 270_000
