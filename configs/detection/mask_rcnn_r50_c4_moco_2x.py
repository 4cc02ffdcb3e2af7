"""As mask_rcnn_r50_c4_moco.py for twice as long; the schedule of MoCo's own release."""

from .mask_rcnn_r50_c4_moco import dataloader, model, optimizer
from .mask_rcnn_r50_fpn_moco_2x import lr_multiplier, train
