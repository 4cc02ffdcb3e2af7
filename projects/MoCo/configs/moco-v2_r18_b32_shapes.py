"""MoCo v2 on the small Mask R-CNN for Shapes: minutes on two CPU cores."""

from region_pretrain.config import get_config
from region_pretrain.projects.moco import moco

from .common.moco import dataloader, lr_multiplier, optimizer, train

model = moco(get_config("detection/mask_rcnn_r18_fpn_shapes.py").model, hidden_dim=512, dim=64)
model.queue.length = 512  # 65,536 keys would contain each of the 1,000 images dozens of times
model.momentum.value = 0.99  # short run; at 0.97 a key's age distinguishes it from the positive
# Without a norm in the head, all embeddings are still nearly identical after 300 steps.
model.head.norm = "SyncBN"
model.temperature = 0.1

_shapes = get_config("common/shapes_pretrain.py")
dataloader.merge_with(_shapes.dataloader)
train.merge_with(_shapes.train)
_views = dataloader.train.dataset.views
_views.size = 64
_views.first_photometry.blur_sigma = (0.1, 0.6)  # (0.1, 2.0) scaled from views of 224 to 64 pixels
_views.second_photometry.blur_sigma = (0.1, 0.6)

optimizer.lr = 0.3  # 0.3 * 32 / 256 = 0.0375
train.output_dir = "output/moco-v2_r18_shapes"
