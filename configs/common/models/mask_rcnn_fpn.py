"""Mask R-CNN R50-FPN for fine-tuning self-supervised weights: all layers are trained, input is RGB.

MoCo, section 4.2: batch norm is trained and synchronised instead of frozen, and also used in the
new FPN layers. Pixels are in 0-255; the 3x3 convolutions carry the stride, as in torchvision.
"""

from detectron2 import model_zoo

constants = model_zoo.get_config("common/data/constants.py").constants
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

model.backbone.norm = "SyncBN"
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = "SyncBN"
model.backbone.bottom_up.stages.norm = "SyncBN"
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.input_format = "RGB"
