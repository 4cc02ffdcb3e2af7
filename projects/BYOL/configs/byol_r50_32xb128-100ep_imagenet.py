"""BYOL R50, ImageNet, 100 epochs. 32 GPUs x 128 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.byol import byol

from .common.byol import dataloader, lr_multiplier, optimizer, train

model = byol(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
model.momentum.start = 0.99
optimizer.lr = 0.45  # 0.45 * 4096 / 256 = 7.2
optimizer.params.weight_decay = 1e-6
train.epochs = 100  # 31,200 iters = 100 ep * 312 iters/ep (1,281,167 images // 4096)
train.output_dir = "output/byol_r50_100ep_imagenet"
