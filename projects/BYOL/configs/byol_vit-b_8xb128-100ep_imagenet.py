"""BYOL ViT-B, the trunk of ViTDet, ImageNet, 100 epochs, AdamW on 8 GPUs; the values are ours."""

from region_pretrain.config import get_config
from region_pretrain.projects.byol import byol

from .common.byol import dataloader, train

_adamw = get_config("common/adamw_pretrain.py")
optimizer, lr_multiplier = _adamw.optimizer, _adamw.lr_multiplier
train.merge_with(_adamw.train)

model = byol(get_config("detection/mask_rcnn_vitdet_b.py").model)
dataloader.train.total_batch_size = 1024
train.epochs = 100  # 125,100 iters = 100 ep * 1,251 iters/ep (1,281,167 images // 1024)
train.output_dir = "output/byol_vit-b_100ep_imagenet"
