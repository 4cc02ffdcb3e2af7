"""SoCo R50-C4, ImageNet, 400 epochs, with cut-out in view 2 as in the release's script."""

from .common.soco_c4 import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.views.cutout_prob = 0.5
train.epochs = 400  # 250,000 iters = 400 ep * 625 iters/ep (1,281,167 images // 2048)
train.output_dir = "output/soco-cutout_r50-c4_400ep_imagenet"
