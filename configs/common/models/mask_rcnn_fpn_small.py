"""Mask R-CNN for Shapes on a CPU: narrow ResNet-18 (24 channels), FPN (48), 4conv1fc box head.

The modules are those of the full-size detector; anchors and level assignment are scaled down from
800-pixel photographs to scenes of about 100 pixels.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from region_pretrain.modeling.narrow_resnet import narrow_resnet18_stages

from .mask_rcnn_fpn import model

_FPN_CHANNELS, _FC = 48, 256

model.backbone.bottom_up.stem.out_channels = 24
model.backbone.bottom_up.stages = L(narrow_resnet18_stages)(channels=24, norm="SyncBN")
model.backbone.out_channels = _FPN_CHANNELS

model.proposal_generator.head.in_channels = _FPN_CHANNELS
model.proposal_generator.anchor_generator.sizes = [[12], [20], [32], [48], [72]]
model.proposal_generator.batch_size_per_image = 64
model.proposal_generator.pre_nms_topk = (500, 300)
model.proposal_generator.post_nms_topk = (200, 100)

heads = model.roi_heads
heads.num_classes = 8
heads.batch_size_per_image = 32
for _pooler in (heads.box_pooler, heads.mask_pooler):
    _pooler.canonical_box_size = 64  # assigned to P4, like 224 at full size
    _pooler.canonical_level = 4
    _pooler.sampling_ratio = 2
heads.box_head.input_shape = ShapeSpec(channels=_FPN_CHANNELS, height=7, width=7)
heads.box_head.conv_dims = [_FPN_CHANNELS] * 4
heads.box_head.fc_dims = [_FC]
heads.box_head.conv_norm = "SyncBN"
heads.box_predictor.input_shape = ShapeSpec(channels=_FC)
heads.mask_head.input_shape = ShapeSpec(channels=_FPN_CHANNELS, height=14, width=14)
heads.mask_head.conv_dims = [_FPN_CHANNELS] * 2
heads.mask_head.conv_norm = "SyncBN"
model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [50.0, 50.0, 50.0]
