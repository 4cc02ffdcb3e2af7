"""BYOL on the small Mask R-CNN for Shapes: minutes on two CPU cores."""

from region_pretrain.config import get_config
from region_pretrain.projects.byol import byol

from .common.byol import dataloader, lr_multiplier, optimizer, train

model = byol(
    get_config("detection/mask_rcnn_r18_fpn_shapes.py").model,
    hidden_dim=512,
    dim=128,
)
model.momentum.start = 0.97  # a short run: the target has to follow within dozens of steps
model.zero_init = False  # the residual blocks would not contribute for most of the run

_shapes = get_config("common/shapes_pretrain.py")
dataloader.merge_with(_shapes.dataloader)
train.merge_with(_shapes.train)
_views = dataloader.train.dataset.views
_views.size = 64
_views.crop_area = (0.2, 1.0)
_views.first_photometry.blur_sigma = (0.1, 0.6)  # (0.1, 2.0) scaled from views of 224 to 64 pixels
_views.second_photometry.blur_sigma = (0.1, 0.6)

optimizer.lr = 4.0  # 4.0 * 32 / 256 = 0.5
optimizer.params.weight_decay = 1e-5
lr_multiplier.update(warmup_epochs=1, warmup_factor=0.01)
train.output_dir = "output/byol_r18_shapes"
