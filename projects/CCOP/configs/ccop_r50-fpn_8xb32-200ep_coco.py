"""CCOP R50-FPN, COCO train2017, 200 epochs: the complete curriculum in a quarter of the time.

The length is ours; the release trains 800 epochs.
"""

from region_pretrain.config import get_config
from region_pretrain.projects.ccop import ccop

from .common.ccop import dataloader, lr_multiplier, optimizer, train

model = ccop(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
train.epochs = 200  # 92,400 iters = 200 ep * 462 iters/ep (118,287 images // 256)
train.output_dir = "output/ccop_r50-fpn_200ep_coco"
