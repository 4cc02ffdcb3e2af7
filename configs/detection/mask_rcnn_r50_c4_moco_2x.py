"""mask_rcnn_r50_c4_moco.py with the 2x schedule, as in MoCo's release."""

from .mask_rcnn_r50_c4_moco import dataloader, model, optimizer
from .mask_rcnn_r50_fpn_moco_2x import lr_multiplier, train
