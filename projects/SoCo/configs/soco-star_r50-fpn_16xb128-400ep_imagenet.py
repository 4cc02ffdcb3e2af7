"""SoCo* R50-FPN, ImageNet, 400 epochs: view 3 has 192 pixels, view 4 is view 2 at 112 pixels."""

from region_pretrain.config import get_config
from region_pretrain.projects.soco import soco

from .common.soco import dataloader, lr_multiplier, optimizer, train

model = soco(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
dataloader.train.dataset.views.update(
    sizes=[224, 224, 192, 112],
    sources=["crop", "crop", 0],  # the last view shows the crop and the regions of view 2
)
train.epochs = 400  # 250,000 iters = 400 ep * 625 iters/ep (1,281,167 images // 2048)
train.output_dir = "output/soco-star_r50-fpn_400ep_imagenet"
