"""SoCo R50-C4, ImageNet, 100 epochs. 16 GPUs x 128 images per GPU."""

from .common.soco_c4 import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 100  # 62,500 iters = 100 ep * 625 iters/ep (1,281,167 images // 2048)
train.output_dir = "output/soco_r50-c4_100ep_imagenet"
