"""MoCo's COCO protocol: Mask R-CNN R50-C4, SyncBN everywhere and after res5, 1x."""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_c4 import model
from .mask_rcnn_r50_fpn_moco import lr_multiplier, optimizer, train
