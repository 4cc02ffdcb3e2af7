"""MCL on the small Mask R-CNN for Shapes: minutes on two CPU cores."""

from region_pretrain.config import get_config

from .common.shapes import (
    DETECTOR,
    LEVEL_WEIGHTS,
    dataloader,
    lr_multiplier,
    mcl_fpn,
    optimizer,
    train,
)

model = mcl_fpn(get_config(DETECTOR).model, hidden_dim=512, dim=128)
model.momentum.start = 0.97  # a short run: the target has to follow within dozens of steps
model.level_weights = LEVEL_WEIGHTS
train.output_dir = "output/mcl_r18-fpn_shapes"
