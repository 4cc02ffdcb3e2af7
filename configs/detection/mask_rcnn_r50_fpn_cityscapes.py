"""Cityscapes, Mask R-CNN R50-FPN, 24k iterations: the protocol of MCL's and CCOP's releases."""

from ..common.data.cityscapes import dataloader
from .mask_rcnn_r50_fpn_moco import lr_multiplier, model, optimizer, train

model.roi_heads.num_classes = 8
optimizer.lr = 0.01
lr_multiplier.update(max_iter=24_000, steps=[18_000])
train.max_iter = 24_000  # 64.5 ep = 24,000 iters * 8 images/iter / 2,975 images/ep
train.base_batch_size = 8
train.eval_period = 8_000
