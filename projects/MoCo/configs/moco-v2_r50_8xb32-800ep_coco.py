"""MoCo v2 R50, COCO train2017, 800 epochs: the baseline for methods pre-trained on COCO.

The learning rate of 0.3 is that of CCOP's recipe; 0.03 is for ImageNet, which has more images.
"""

from region_pretrain.config import get_config
from region_pretrain.projects.moco import moco

from .common.moco import dataloader, lr_multiplier, optimizer, train

model = moco(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
dataloader.train.dataset.names = "coco_2017_train_images"
optimizer.lr = 0.3
train.epochs = 800  # 369,600 iters = 800 ep * 462 iters/ep (118,287 images // 256)
train.output_dir = "output/moco-v2_r50_800ep_coco"
