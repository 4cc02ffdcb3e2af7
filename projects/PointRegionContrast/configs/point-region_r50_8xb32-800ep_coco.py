"""Point-level region contrast R50, COCO train2017, 800 epochs; learning rate of MoCo v2 on COCO."""

from region_pretrain.config import get_config
from region_pretrain.projects.point_region_contrast import point_region

from .common.point_region import dataloader, lr_multiplier, optimizer, train

model = point_region(get_config("detection/mask_rcnn_r50_fpn_moco.py").model, level="trunk")
dataloader.train.dataset.names = "coco_2017_train_images"
optimizer.lr = 0.3
train.epochs = 800  # 369,600 iters = 800 ep * 462 iters/ep (118,287 images // 256)
train.output_dir = "output/point-region_r50_800ep_coco"
