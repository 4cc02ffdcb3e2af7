"""SoCo R50-FPN, ImageNet, 100 epochs. 16 GPUs x 128 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.soco import soco

from .common.soco import dataloader, lr_multiplier, optimizer, train

model = soco(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
train.epochs = 100  # 62,500 iters = 100 ep * 625 iters/ep (1,281,167 images // 2048)
train.output_dir = "output/soco_r50-fpn_100ep_imagenet"
