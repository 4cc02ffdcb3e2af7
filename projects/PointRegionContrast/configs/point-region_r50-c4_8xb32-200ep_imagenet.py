"""Point-level region contrast R50-C4, ImageNet, 200 epochs, for C4 detectors (VOC)."""

from region_pretrain.config import get_config
from region_pretrain.projects.point_region_contrast import point_region

from .common.point_region import dataloader, lr_multiplier, optimizer, train

model = point_region(get_config("detection/mask_rcnn_r50_c4_moco.py").model)
train.epochs = 200  # 1,000,800 iters = 200 ep * 5,004 iters/ep (1,281,167 images // 256)
train.output_dir = "output/point-region_r50-c4_200ep_imagenet"
