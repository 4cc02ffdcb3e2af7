"""FCOS R50-FPN, COCO 1x: Detectron2's fcos_R_50_FPN_1x.py with SyncBN in trunk and FPN."""

from ..common.models.from_zoo import from_zoo
from .retinanet_r50_fpn import dataloader, lr_multiplier, optimizer, train

model = from_zoo("fcos")
