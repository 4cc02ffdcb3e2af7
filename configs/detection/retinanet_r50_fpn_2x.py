"""retinanet_r50_fpn.py with the 2x schedule."""

from .mask_rcnn_r50_fpn_moco_2x import lr_multiplier, train
from .retinanet_r50_fpn import dataloader, model, optimizer
