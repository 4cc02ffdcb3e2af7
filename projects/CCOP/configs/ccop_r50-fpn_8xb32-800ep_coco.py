"""CCOP R50-FPN, COCO train2017, 800 epochs. 8 GPUs x 32 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.ccop import ccop

from .common.ccop import dataloader, lr_multiplier, optimizer, train

model = ccop(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
train.epochs = 800  # 369,600 iters = 800 ep * 462 iters/ep (118,287 images // 256)
train.output_dir = "output/ccop_r50-fpn_800ep_coco"
