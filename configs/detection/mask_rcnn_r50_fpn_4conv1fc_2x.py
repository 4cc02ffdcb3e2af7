"""mask_rcnn_r50_fpn_4conv1fc.py with the 2x schedule."""

from .mask_rcnn_r50_fpn_4conv1fc import dataloader, model, optimizer
from .mask_rcnn_r50_fpn_moco_2x import lr_multiplier, train
