"""RetinaNet R50-FPN, COCO 1x: lr 0.01, SyncBN in trunk and FPN, as in MCL's and CCOP's releases."""

from ..common.data.coco import dataloader
from ..common.models.from_zoo import from_zoo
from .mask_rcnn_r50_fpn_moco import lr_multiplier, optimizer, train

model = from_zoo("retinanet")
dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
