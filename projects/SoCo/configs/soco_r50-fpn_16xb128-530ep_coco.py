"""SoCo R50-FPN, COCO train2017 + unlabeled2017, 530 epochs: as many samples as 100 on ImageNet."""

from region_pretrain.config import get_config
from region_pretrain.projects.soco import soco

from .common.soco import dataloader, lr_multiplier, optimizer, train

model = soco(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
dataloader.train.dataset.names = ["coco_2017_train_images", "coco_2017_unlabeled_images"]
dataloader.train.dataset.regions = "regions/coco_2017_train_unlabeled.arrow"
lr_multiplier.warmup_epochs = 53  # 6,254 iters; 6,250 on ImageNet
train.epochs = 530  # 62,540 iters = 530 ep * 118 iters/ep (241,690 images // 2048)
train.output_dir = "output/soco_r50-fpn_530ep_coco"
