"""MoCo v1 R50, ImageNet, 200 epochs (arXiv 1911.05722). 8 GPUs x 32 images per GPU.

A linear head, temperature 0.07, learning-rate drops at 120 and 160 epochs, and an augmentation
without blur. The release converts to greyscale before the colour jitter instead of after it.
"""

from detectron2.config import LazyCall as L
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.projects.moco import moco
from region_pretrain.solver import warmup_multistep

from .common.moco import dataloader, optimizer, train

model = moco(get_config("detection/mask_rcnn_r50_fpn_moco.py").model)
model.head = L(nn.Linear)(in_features=2048, out_features=128)
model.temperature = 0.07
for _photometry in ("first_photometry", "second_photometry"):
    dataloader.train.dataset.views[_photometry].update(hue=0.4, jitter_prob=1.0, blur_prob=0.0)

# In epochs: only their ratio to max_iter counts.
lr_multiplier = L(warmup_multistep)(max_iter=200, steps=[120, 160], warmup_iters=0)
train.epochs = 200  # 1,000,800 iters = 200 ep * 5,004 iters/ep (1,281,167 images // 256)
train.output_dir = "output/moco-v1_r50_200ep_imagenet"
