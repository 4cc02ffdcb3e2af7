"""LVIS v1, SoCo's protocol: 4conv1fc box head, weight decay 2.5e-5, 90k iterations.

The release's config names a base file that it lacks; what it does not set is Detectron2's.
"""

from ..common.data.lvis import dataloader
from .mask_rcnn_r50_fpn_4conv1fc import lr_multiplier, model, optimizer, train

model.roi_heads.num_classes = 1203
model.roi_heads.box_predictor.update(test_score_thresh=1e-4, test_topk_per_image=300)
optimizer.weight_decay = 2.5e-5
