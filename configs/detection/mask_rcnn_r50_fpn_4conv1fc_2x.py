"""As mask_rcnn_r50_fpn_4conv1fc.py for twice as long."""

from .mask_rcnn_r50_fpn_4conv1fc import dataloader, model, optimizer
from .mask_rcnn_r50_fpn_moco_2x import lr_multiplier, train
