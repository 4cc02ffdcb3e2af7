"""Supervised MCL R50-FPN, ImageNet, 100 epochs: each tile is classified into its image's class."""

from region_pretrain.config import get_config
from region_pretrain.projects.mcl import supervised_mcl

from .common.mcl import dataloader, lr_multiplier, optimizer, train

model = supervised_mcl(
    get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model, num_classes=1000
)
dataloader.train.dataset.names = "imagenet_train_labeled"
dataloader.train.dataset.labels = True
train.epochs = 100  # 31,200 iters = 100 ep * 312 iters/ep (1,281,167 images // 4096)
train.output_dir = "output/mcl-supervised_r50-fpn_100ep_imagenet"
