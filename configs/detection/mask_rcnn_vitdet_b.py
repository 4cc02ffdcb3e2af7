"""Mask R-CNN ViTDet-B, COCO, 100 epochs with large-scale jitter.

ViTDet (arXiv 2203.16527), appendix A.2, with Detectron2's model. What differs is ours: biases, all
norms and the tables of relative positions are not decayed, and autocast uses bfloat16.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from region_pretrain.solver import warmup_multistep

from ..common.data.coco_lsj import dataloader
from ..common.optim import adamw as optimizer
from ..common.train import train

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model

optimizer.params.layer_decay = 0.7
train.max_iter = 184_375  # 100 ep = 184,375 iters * 64 images/iter / 118,000 images/ep
lr_multiplier = L(warmup_multistep)(max_iter=184_375, steps=[163_889, 177_546], warmup_iters=250)
train.base_batch_size = 64
train.amp.enabled = True
