"""MoCo's VOC protocol: Faster R-CNN R50-C4, trainval 07+12 to test 07, 24k iterations."""

from ..common.data.voc import dataloader
from ..common.models.mask_rcnn_c4 import model
from .mask_rcnn_r50_c4_moco import lr_multiplier, optimizer, train

model.roi_heads.num_classes = 20
model.roi_heads.mask_head = None
lr_multiplier.update(max_iter=24_000, steps=[18_000, 22_000], warmup_iters=100)
train.max_iter = 24_000  # 23.2 ep = 24,000 iters * 16 images/iter / 16,551 images/ep
train.eval_period = 24_000
