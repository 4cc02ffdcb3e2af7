"""SoCo R50-FPN, ImageNet, 100 epochs on 8 GPUs: half the batch size and learning rate (4.0)."""

from region_pretrain.config import get_config
from region_pretrain.projects.soco import soco

from .common.soco import dataloader, lr_multiplier, optimizer, train

model = soco(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
dataloader.train.total_batch_size = 1024
lr_multiplier.final_factor = 2.5e-7  # 1e-6 of 4.0
train.epochs = 100  # 125,100 iters = 100 ep * 1,251 iters/ep (1,281,167 images // 1024)
train.output_dir = "output/soco_r50-fpn_8xb128_100ep_imagenet"
