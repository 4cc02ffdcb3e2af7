"""BYOL R50, COCO train2017, 800 epochs. 8 GPUs x 128 images per GPU."""

from region_pretrain.config import get_config
from region_pretrain.projects.byol import byol

from .common.byol import dataloader, lr_multiplier, optimizer, train

model = byol(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
dataloader.train.dataset.names = "coco_2017_train_images"
dataloader.train.total_batch_size = 1024
# The preset for 100 epochs of ImageNet: 800 ep of COCO are 94.6M images, 74 ep of ImageNet.
optimizer.lr = 0.45  # 0.45 * 1024 / 256 = 1.8
optimizer.params.weight_decay = 1e-6
train.epochs = 800  # 92,000 iters = 800 ep * 115 iters/ep (118,287 images // 1024)
train.output_dir = "output/byol_r50_800ep_coco"
