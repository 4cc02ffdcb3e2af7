"""MoCo v2 R50, ImageNet, 800 epochs. 8 GPUs x 32 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.moco import moco

from .common.moco import dataloader, lr_multiplier, optimizer, train

model = moco(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
train.epochs = 800  # 4,003,200 iters = 800 ep * 5,004 iters/ep (1,281,167 images // 256)
train.output_dir = "output/moco-v2_r50_800ep_imagenet"
