"""BYOL R50, ImageNet, 300 epochs. 32 GPUs x 128 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.byol import byol

from .common.byol import dataloader, lr_multiplier, optimizer, train

model = byol(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
model.momentum.start = 0.99
optimizer.lr = 0.3  # 0.3 * 4096 / 256 = 4.8
optimizer.params.weight_decay = 1e-6
train.epochs = 300  # 93,600 iters = 300 ep * 312 iters/ep (1,281,167 images // 4096)
train.output_dir = "output/byol_r50_300ep_imagenet"
