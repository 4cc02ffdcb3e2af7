"""MoCo v2 R50, COCO train2017, 800 epochs: the baseline of methods that pre-train on COCO.

The learning rate is that of CCOP's recipe, 0.3: 0.03 is for ImageNet's many images.
"""

from region_pretrain.config import get_config

from .common.moco import dataloader, lr_multiplier, moco, optimizer, train

model = moco(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
dataloader.train.dataset.names = "coco_2017_train_images"
optimizer.lr = 0.3
train.epochs = 800  # 369,600 iters = 800 ep * 462 iters/ep, 118,287 images / 256 a batch
train.output_dir = "output/moco-v2_r50_800ep_coco"
