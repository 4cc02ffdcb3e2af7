"""Point-level region contrast on P3 of the small Mask R-CNN for Shapes: minutes on two CPU cores.

P3 has 8 x 8 places per 64-pixel view, the trunk's last map only 2 x 2.
"""

from region_pretrain.config import get_config
from region_pretrain.projects.point_region_contrast import point_region

from .common.shapes import dataloader, for_a_short_run, lr_multiplier, optimizer, train

model = for_a_short_run(
    point_region(
        get_config("detection/mask_rcnn_r18_fpn_shapes.py").model,
        level="p3",
        hidden_dim=512,
        dim=64,
    )
)
train.output_dir = "output/point-region_r18-fpn_shapes"
