"""SoCo R50-C4, ImageNet, 100 epochs, with cut-out in view 2 as in the release's script."""

from .common.soco_c4 import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.views.cutout_prob = 0.5
train.epochs = 100  # 62,500 iters = 100 ep * 625 iters/ep (1,281,167 images // 2048)
train.output_dir = "output/soco-cutout_r50-c4_100ep_imagenet"
