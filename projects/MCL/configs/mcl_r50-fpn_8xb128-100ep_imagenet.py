"""MCL R50-FPN, ImageNet, 100 epochs on 8 GPUs: a quarter of batch size, lr (4.0) and negatives."""

from region_pretrain.config import get_config
from region_pretrain.projects.mcl import mcl

from .common.mcl import dataloader, lr_multiplier, optimizer, train

model = mcl(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
dataloader.train.total_batch_size = 1024
lr_multiplier.final_factor = 2.5e-5  # 1e-4 of 4.0
train.epochs = 100  # 125,100 iters = 100 ep * 1,251 iters/ep (1,281,167 images // 1024)
train.checkpointer.period = 5004  # 4 epochs
train.output_dir = "output/mcl_r50-fpn_8xb128_100ep_imagenet"
