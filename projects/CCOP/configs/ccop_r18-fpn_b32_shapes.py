"""CCOP around the small Mask R-CNN of Shapes: minutes on two CPU cores."""

from detectron2.config import LazyCall as L

from region_pretrain.config import get_config
from region_pretrain.data.shapes import shapes

from .common.ccop import ccop_fpn, dataloader, lr_multiplier, optimizer, train

model = ccop_fpn(
    get_config("detection/mask_rcnn_r18_fpn_shapes.py").model, trunk_dim=192, hidden_dim=512, dim=64
)
# 1,000 images fill no more: a queue of 65,536 would hold each of them dozens of times.
model.image_queue.length = 512
model.region_queue.length = 4096
# A short run from random weights: with the recipe's own heads, whose weights start at N(0, 0.01)
# and which have no norm, all images' embeddings are still nearly the same after 300 steps.
for _head in (model.image_head, model.region_head):
    _head.init_std = None
    _head.norm = "SyncBN"
model.momentum.value = 0.99
model.temperature = 0.1
model.level_scales = [16, 32, 60, 64]  # 224-pixel views' bounds for 64 would be 14, 27, 55, 64

dataset = dataloader.train.dataset
dataset.names = L(shapes)(split="unlabeled", size=1000, side=96, level="easy")
dataset.regions = "output/shapes_ccop_regions.arrow"
dataset.recipe = "ccop-v1+min_size=10"  # 20 pixels of a photograph would drop most objects
dataset.views.size = 64
dataset.views.min_area = 36.0
dataset.views.crop_areas = [(0.2, 1.0), (0.2, 1.0)]
dataset.views.photometry.blur_sigma = (0.1, 0.6)  # 2.0 pixels of a 224 view
del dataset
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = 1

optimizer.lr = 0.8  # 0.8 * 32 / 256 = 0.1
train.epochs = 10  # 310 iters = 10 ep * 31 iters/ep, 1,000 images / 32 a batch
lr_multiplier.warmup_epochs = 1
train.log_period = 10
train.checkpointer.period = 100
train.checkpointer.keep_every = 0
train.output_dir = "output/ccop_r18-fpn_shapes"
