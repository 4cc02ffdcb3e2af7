"""Mask R-CNN Swin-T FPN, COCO 1x, AdamW; the schedule is ours."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import SwinTransformer

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_fpn import model
from ..common.optim import adamw as optimizer
from ..common.schedule import detection_1x as lr_multiplier
from ..common.train import train

model.backbone.bottom_up = L(SwinTransformer)(
    embed_dim=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    drop_path_rate=0.1,
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")
model.backbone.norm = ""

optimizer.weight_decay = 0.05
train.max_iter = 90_000  # 12.3 ep = 90,000 iters * 16 images/iter / 117,266 images/ep
train.base_batch_size = 16
train.amp.enabled = True
