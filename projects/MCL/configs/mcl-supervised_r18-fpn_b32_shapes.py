"""Supervised MCL on Shapes: the annotated objects, cut out one by one, classified as tiles."""

from detectron2.config import LazyCall as L

from region_pretrain.config import get_config
from region_pretrain.projects.mcl.objects import object_crops

from .common.shapes import (
    DETECTOR,
    LEVEL_WEIGHTS,
    dataloader,
    lr_multiplier,
    optimizer,
    supervised_fpn,
    train,
)

model = supervised_fpn(get_config(DETECTOR).model, num_classes=8)
model.level_weights = LEVEL_WEIGHTS
dataset = dataloader.train.dataset
dataset.names = L(object_crops)(names=dataset.names, context=1.5)  # of the 1,000 scenes
dataset.labels = True
dataset.views.crop_area = (0.5, 1.0)  # most of the object
del dataset
train.output_dir = "output/mcl-supervised_r18-fpn_shapes"
