"""MoCo's COCO protocol: Mask R-CNN R50-FPN, 2-fc box head, SyncBN in backbone and FPN, 1x."""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_fpn import model
from ..common.optim import sgd as optimizer
from ..common.schedule import detection_1x as lr_multiplier
from ..common.train import train

train.max_iter = 90_000  # 12.3 ep = 90,000 iters * 16 images/iter / 117,266 images/ep
train.base_batch_size = 16
train.precise_bn.enabled = True
