"""A small Mask R-CNN on 100 labelled images of Shapes: minutes on two CPU cores."""

from ..common.data.shapes import dataloader
from ..common.models.mask_rcnn_fpn_small import model
from ..common.optim import sgd as optimizer
from ..common.schedule import detection_1x as lr_multiplier
from ..common.train import train

train.max_iter = 300  # 24 ep = 300 iters * 8 images/iter / 100 images/ep
train.eval_period = 100
train.log_period = 10
train.checkpointer.period = 100
train.output_dir = "output/mask_rcnn_r18_fpn_shapes"
optimizer.lr = 0.1
lr_multiplier.max_iter = train.max_iter
lr_multiplier.steps = [225, 275]
lr_multiplier.warmup_iters = 50
lr_multiplier.warmup_factor = 0.01
