"""MoCo v2 R50, ImageNet, 200 epochs. 8 GPUs x 32 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.moco import moco

from .common.moco import dataloader, lr_multiplier, optimizer, train

model = moco(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
train.epochs = 200  # 1,000,800 iters = 200 ep * 5,004 iters/ep (1,281,167 images // 256)
train.output_dir = "output/moco-v2_r50_200ep_imagenet"
