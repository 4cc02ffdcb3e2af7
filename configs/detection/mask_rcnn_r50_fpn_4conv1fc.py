"""Mask R-CNN R50-FPN with a 4conv1fc box head and SyncBN in both heads, COCO 1x."""

from .mask_rcnn_r50_fpn_moco import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.box_head.conv_norm = "SyncBN"
model.roi_heads.mask_head.conv_norm = "SyncBN"
