"""SoCo R50-C4, ImageNet, 400 epochs. 16 GPUs x 128 images per GPU."""

from .common.soco_c4 import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 400  # 250,000 iters = 400 ep * 625 iters/ep (1,281,167 images // 2048)
train.output_dir = "output/soco_r50-c4_400ep_imagenet"
