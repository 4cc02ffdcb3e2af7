"""Point-level region contrast on the trunk of the small Mask R-CNN for Shapes.

The trunk's last map has only 2 x 2 places per view, so the grid has 2 x 2 cells.
"""

from region_pretrain.config import get_config
from region_pretrain.projects.point_region_contrast import point_region

from .common.shapes import dataloader, for_a_short_run, lr_multiplier, optimizer, train

model = for_a_short_run(
    point_region(
        get_config("detection/mask_rcnn_r18_fpn_shapes.py").model,
        level="trunk",
        hidden_dim=512,
        dim=64,
    )
)
dataloader.train.dataset.views.maps.n = 2
train.output_dir = "output/point-region_r18_shapes"
