"""SoCo R50-FPN, ImageNet, 100 epochs, with cut-out in views 2 and 3 as in the release's script.

The released code fails in its cut-out, so how the published weights were trained is unknown.
"""

from region_pretrain.config import get_config
from region_pretrain.projects.soco import soco

from .common.soco import dataloader, lr_multiplier, optimizer, train

model = soco(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
dataloader.train.dataset.views.cutout_prob = 0.5
train.epochs = 100  # 62,500 iters = 100 ep * 625 iters/ep (1,281,167 images // 2048)
train.output_dir = "output/soco-cutout_r50-fpn_100ep_imagenet"
