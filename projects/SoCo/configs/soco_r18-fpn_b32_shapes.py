"""SoCo on the small Mask R-CNN for Shapes: minutes on two CPU cores."""

from region_pretrain.config import get_config
from region_pretrain.projects.soco import soco

from .common.soco import dataloader, lr_multiplier, optimizer, train

model = soco(get_config("detection/mask_rcnn_r18_fpn_shapes.py").model, hidden_dim=512, dim=128)
model.momentum.start = 0.97  # a short run: the target has to follow within dozens of steps
model.level_scales = [16, 32, 60, 64]  # the 224-pixel bounds scaled to 64 would be 14, 27, 55, 64

_shapes = get_config("common/shapes_pretrain.py")
dataloader.merge_with(_shapes.dataloader)
train.merge_with(_shapes.train)
_dataset = dataloader.train.dataset
_dataset.regions = "output/shapes_regions.arrow"
_dataset.recipe = "shapes-v1"
_dataset.views.sizes = [64, 64, 32]
# (0.1, 2.0) scaled from views of 224 to 64 pixels
_dataset.views.first_photometry.blur_sigma = (0.1, 0.6)
_dataset.views.other_photometry.blur_sigma = (0.1, 0.6)

optimizer.lr = 4.0  # 4.0 * 32 / 256 = 0.5
lr_multiplier.warmup_epochs = 1
train.epochs = 14  # 434 iters = 14 ep * 31 iters/ep (1,000 images // 32)
train.output_dir = "output/soco_r18-fpn_shapes"
