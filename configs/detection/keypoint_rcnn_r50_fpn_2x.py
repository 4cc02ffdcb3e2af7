"""keypoint_rcnn_r50_fpn.py with the 2x schedule, as in MCL's and CCOP's releases."""

from .keypoint_rcnn_r50_fpn import dataloader, model, optimizer
from .mask_rcnn_r50_fpn_moco_2x import lr_multiplier, train
