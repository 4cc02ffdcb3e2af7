"""Cascade Mask R-CNN R50-FPN, COCO 1x: Detectron2's cascade_mask_rcnn_R_50_FPN_1x.yaml, SyncBN."""

from ..common.models.from_zoo import from_zoo
from .mask_rcnn_r50_fpn_moco import dataloader, lr_multiplier, optimizer, train

model = from_zoo("cascade_rcnn")
model.proposal_generator.post_nms_topk = (2000, 1000)
