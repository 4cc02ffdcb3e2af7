"""Mask R-CNN R50-C4 as self-supervised weights are fine-tuned: every layer trains, RGB input.

MoCo, section 4.2 and appendix: batch norm is trained and synchronised, and one more norm follows
res5. (MoCo's own release has Detectron2's "naiveSyncBN" here, with the same keys.)
"""

from detectron2 import model_zoo

from region_pretrain.modeling.res5 import res5_stage_with_norm

constants = model_zoo.get_config("common/data/constants.py").constants
model = model_zoo.get_config("common/models/mask_rcnn_c4.py").model

model.backbone.freeze_at = 0
model.backbone.stem.norm = "SyncBN"
model.backbone.stages.norm = "SyncBN"
model.backbone.stages.stride_in_1x1 = False
model.roi_heads.res5._target_ = res5_stage_with_norm
model.roi_heads.res5.norm = "SyncBN"
model.roi_heads.res5.stride_in_1x1 = False
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.input_format = "RGB"
