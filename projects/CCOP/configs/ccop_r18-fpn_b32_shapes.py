"""CCOP on the small Mask R-CNN for Shapes: minutes on two CPU cores."""

from region_pretrain.config import get_config
from region_pretrain.projects.ccop import ccop

from .common.ccop import dataloader, lr_multiplier, optimizer, train

model = ccop(get_config("detection/mask_rcnn_r18_fpn_shapes.py").model, hidden_dim=512, dim=64)
# For 1,000 images: a queue of 65,536 keys would contain each image dozens of times.
model.image_queue.length = 512
model.region_queue.length = 4096
# A short run from random weights: with the recipe's own heads (weights from N(0, 0.01), no norm)
# the embeddings of all images are still nearly identical after 300 steps.
for _head in (model.image_head, model.region_head):
    _head.init_std = None
    _head.norm = "SyncBN"
model.momentum.value = 0.99
model.temperature = 0.1
model.level_scales = [16, 32, 60, 64]  # the 224-pixel bounds scaled to 64 would be 14, 27, 55, 64

_shapes = get_config("common/shapes_pretrain.py")
dataloader.merge_with(_shapes.dataloader)
train.merge_with(_shapes.train)
_dataset = dataloader.train.dataset
_dataset.regions = "output/shapes_ccop_regions.arrow"
_dataset.recipe = "ccop-v1+min_size=10"  # the 20 pixels for photographs would drop most objects
_dataset.views.size = 64
_dataset.views.min_area = 36.0
_dataset.views.crop_areas = [(0.2, 1.0), (0.2, 1.0)]
# (0.1, 2.0) scaled from views of 224 to 64 pixels
_dataset.views.photometry.blur_sigma = (0.1, 0.6)

optimizer.lr = 0.8  # 0.8 * 32 / 256 = 0.1
lr_multiplier.warmup_epochs = 1
train.output_dir = "output/ccop_r18-fpn_shapes"
