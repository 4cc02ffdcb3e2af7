"""Supervised MCL R50-FPN, ImageNet, 100 epochs: each tile is classified into its image's class."""

from region_pretrain.config import get_config

from .common.mcl import dataloader, lr_multiplier, optimizer, supervised_fpn, train

model = supervised_fpn(
    get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model, num_classes=1000
)
dataloader.train.dataset.names = "imagenet_train_labeled"
dataloader.train.dataset.labels = True
train.epochs = 100  # 31,200 iters = 100 ep * 312 iters/ep (1,281,167 images // 4096)
train.output_dir = "output/mcl-supervised_r50-fpn_100ep_imagenet"
