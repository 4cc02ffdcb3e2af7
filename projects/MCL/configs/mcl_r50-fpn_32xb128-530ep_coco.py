"""MCL R50-FPN, COCO train2017 + unlabeled2017, 530 epochs: as many steps as 100 on ImageNet."""

from region_pretrain.config import get_config
from region_pretrain.projects.mcl import mcl

from .common.mcl import dataloader, lr_multiplier, optimizer, train

model = mcl(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
dataloader.train.dataset.names = ["coco_2017_train_images", "coco_2017_unlabeled_images"]
lr_multiplier.warmup_epochs = 53  # 3,127 iters, as on ImageNet
train.epochs = 530  # 31,270 iters = 530 ep * 59 iters/ep (241,690 images // 4096)
train.output_dir = "output/mcl_r50-fpn_530ep_coco"
