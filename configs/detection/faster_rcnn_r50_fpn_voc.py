"""VOC with an FPN: faster_rcnn_r50_c4_voc.py's data and schedule for Faster R-CNN R50-FPN."""

from .faster_rcnn_r50_c4_voc import dataloader, lr_multiplier, optimizer, train
from .faster_rcnn_r50_fpn_moco import model

model.roi_heads.num_classes = 20
