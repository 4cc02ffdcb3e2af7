"""SoCo's C4 variant: two views, res5 as the head, no box jitter."""

from region_pretrain.config import get_config
from region_pretrain.projects.soco import soco

from .soco import C4_VIEWS, dataloader, lr_multiplier, optimizer, train

model = soco(get_config("detection/mask_rcnn_r50_c4_moco.py").model)
dataloader.train.dataset.views.update(C4_VIEWS)
