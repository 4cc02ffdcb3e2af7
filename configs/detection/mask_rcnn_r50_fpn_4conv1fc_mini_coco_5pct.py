"""Mini-COCO, SoCo's few-label protocol: the first 5 % of the labelled train2017 images."""

from detectron2.config import LazyCall as L

from region_pretrain.data.few_label import first_fraction

from .mask_rcnn_r50_fpn_4conv1fc import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset = L(first_fraction)(names="coco_2017_train", fraction=0.05)
optimizer.weight_decay = 2.5e-5
lr_multiplier.update(max_iter=5_500, steps=[4_000, 5_000])
train.max_iter = 5_500  # 15.0 ep = 5,500 iters * 16 images/iter / 5,863 images/ep
