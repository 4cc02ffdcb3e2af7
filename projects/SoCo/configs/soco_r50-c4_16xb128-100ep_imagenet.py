"""SoCo R50-C4, ImageNet, 100 epochs: two views, res5 as the head, no box jitter."""

from region_pretrain.config import get_config

from .common.soco import dataloader, lr_multiplier, optimizer, soco_c4, train

model = soco_c4(get_config("detection/mask_rcnn_r50_c4_moco.py").model)
dataloader.train.dataset.views.update(
    sizes=[224, 224], sources=["crop"], crop_area=(0.6, 1.0), jitter_prob=0.0
)
train.epochs = 100  # 62500 iters = 100 ep * 625 iters/ep, 1,281,167 images / 2048 a batch
train.output_dir = "output/soco_r50-c4_100ep_imagenet"
