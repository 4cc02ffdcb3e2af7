"""MCL R50, backbone only, ImageNet, 100 epochs: levels from C5; only the trunk transfers."""

from region_pretrain.config import get_config
from region_pretrain.projects.mcl import mcl

from .common.mcl import dataloader, lr_multiplier, optimizer, train

model = mcl(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model, trunk_only=True)
train.epochs = 100  # 31,200 iters = 100 ep * 312 iters/ep (1,281,167 images // 4096)
train.output_dir = "output/mcl_r50_100ep_imagenet"
