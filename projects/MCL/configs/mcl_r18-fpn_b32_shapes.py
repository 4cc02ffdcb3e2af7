"""MCL on the small Mask R-CNN for Shapes: minutes on two CPU cores."""

from region_pretrain.config import get_config
from region_pretrain.projects.mcl import mcl

from .common.shapes import (
    DETECTOR,
    RATIOS,
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

model = mcl(get_config(DETECTOR).model, hidden_dim=512, dim=128, ratios=RATIOS)
model.momentum.start = 0.97  # a short run: the target has to follow within dozens of steps
train.output_dir = "output/mcl_r18-fpn_shapes"
