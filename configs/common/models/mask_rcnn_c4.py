"""Mask R-CNN R50-C4 for fine-tuning self-supervised weights: all layers are trained, input is RGB.

MoCo, section 4.2 and appendix: batch norm is trained and synchronised, and an extra norm follows
res5. (MoCo's release uses Detectron2's "naiveSyncBN" here, which has the same keys.)
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
