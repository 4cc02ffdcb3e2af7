"""SoCo's C4 variant: two views, res5 as the head, no box jitter."""

from region_pretrain.config import get_config

from .soco import C4_VIEWS, dataloader, lr_multiplier, optimizer, soco_c4, train

model = soco_c4(get_config("detection/mask_rcnn_r50_c4_moco.py").model)
dataloader.train.dataset.views.update(C4_VIEWS)
