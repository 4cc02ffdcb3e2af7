"""Shapes for detection, without resizing: 100 labelled images and 400 for validation."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from region_pretrain.data.shapes import shapes

from .coco import dataloader

SIDE = 96

dataloader.train.dataset.names = L(shapes)(split="train", size=100, side=SIDE, level="easy")
dataloader.test.dataset.names = L(shapes)(split="val", size=400, side=SIDE, level="easy")
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True)]
dataloader.test.mapper.augmentations = []
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
dataloader.test.num_workers = 0
dataloader.test.batch_size = 16
