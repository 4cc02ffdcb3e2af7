"""Supervised MCL on Shapes: tiles show cropped annotated objects and are classified."""

from detectron2.config import LazyCall as L

from region_pretrain.config import get_config
from region_pretrain.projects.mcl import supervised_mcl
from region_pretrain.projects.mcl.objects import object_crops

from .common.shapes import (
    DETECTOR,
    RATIOS,
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

model = supervised_mcl(get_config(DETECTOR).model, num_classes=8, ratios=RATIOS)
_dataset = dataloader.train.dataset
_dataset.names = L(object_crops)(names=_dataset.names, context=1.5)  # of the 1,000 scenes
_dataset.labels = True
_dataset.views.crop_area = (0.5, 1.0)  # most of the object
train.output_dir = "output/mcl-supervised_r18-fpn_shapes"
