"""LVIS v1: Detectron2's LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml with SyncBN."""

from ..common.data.lvis import dataloader
from .mask_rcnn_r50_fpn_moco import model, optimizer
from .mask_rcnn_r50_fpn_moco_2x import lr_multiplier, train  # 28.8 epochs of 100,170 images

model.roi_heads.num_classes = 1203
model.roi_heads.box_predictor.update(test_score_thresh=1e-4, test_topk_per_image=300)
