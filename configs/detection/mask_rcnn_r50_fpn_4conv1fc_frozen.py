"""Probe of a pre-trained backbone, FPN and box head: all else is trained, RPN and mask head too.

As in the frozen evaluation of SoCo's fork of Detectron2; the schedule and the weight decay are
those of the base config. Detectron2's own training script does not know ``train.freeze``.
"""

from .mask_rcnn_r50_fpn_4conv1fc import dataloader, lr_multiplier, model, optimizer, train

train.freeze = ["backbone", "roi_heads.box_head"]
