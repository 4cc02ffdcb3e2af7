"""Mini-COCO, SoCo's few-label protocol: the first 10 % of the labelled train2017 images."""

from detectron2.config import LazyCall as L

from region_pretrain.data.few_label import first_fraction

from .mask_rcnn_r50_fpn_4conv1fc import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset = L(first_fraction)(names="coco_2017_train", fraction=0.1)
optimizer.weight_decay = 2.5e-5
lr_multiplier.update(max_iter=10_000, steps=[7_000, 9_000])
train.max_iter = 10_000  # 13.6 ep = 10,000 iters * 16 images/iter / 11,726 images/ep
