"""SoCo around the small Mask R-CNN of Shapes: minutes on two CPU cores."""

from detectron2.config import LazyCall as L

from region_pretrain.config import get_config
from region_pretrain.data.shapes import shapes

from .common.soco import dataloader, lr_multiplier, optimizer, soco_fpn, train

model = soco_fpn(get_config("detection/mask_rcnn_r18_fpn_shapes.py").model, hidden_dim=512, dim=128)
model.momentum.start = 0.97  # a short run: the target has to follow within dozens of steps
model.level_scales = [16, 32, 60, 64]  # 224-pixel views' bounds for 64 would be 14, 27, 55, 64

dataset = dataloader.train.dataset
dataset.names = L(shapes)(split="unlabeled", size=1000, side=96, level="easy")
dataset.regions = "output/shapes_regions.arrow"
dataset.recipe = "shapes-v1"
dataset.views.sizes = [64, 64, 32]
dataset.views.first_photometry.blur_sigma = (0.1, 0.6)  # 2.0 pixels of a 224 view
dataset.views.other_photometry.blur_sigma = (0.1, 0.6)
del dataset
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = 1

optimizer.lr = 4.0  # 4.0 * 32 / 256 = 0.5
train.epochs = 14  # 434 iters = 14 ep * 31 iters/ep, 1,000 images / 32 a batch
lr_multiplier.warmup_epochs = 1
train.amp.enabled = False
train.channels_last = False
train.log_period = 10
train.checkpointer.period = 100
train.checkpointer.keep_every = 0
train.output_dir = "output/soco_r18-fpn_shapes"
