"""BYOL R50, ImageNet, 1000 epochs, the paper's main run. 32 GPUs x 128 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.byol import byol

from .common.byol import dataloader, lr_multiplier, optimizer, train

model = byol(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
model.momentum.start = 0.996
optimizer.lr = 0.2  # 0.2 * 4096 / 256 = 3.2
optimizer.params.weight_decay = 1.5e-6
train.epochs = 1000  # 312,000 iters = 1000 ep * 312 iters/ep (1,281,167 images // 4096)
train.output_dir = "output/byol_r50_1000ep_imagenet"
