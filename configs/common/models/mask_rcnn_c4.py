"""Mask R-CNN R50-C4 for fine-tuning self-supervised weights.

MoCo, section 4.2 and appendix: an extra norm follows res5. (MoCo's release uses Detectron2's
"naiveSyncBN" here, which has the same keys.)
"""

from region_pretrain.modeling.res5 import res5_stage_with_norm

from .from_zoo import from_zoo

model = from_zoo("mask_rcnn_c4")
model.roi_heads.res5._target_ = res5_stage_with_norm
model.roi_heads.res5.norm = "SyncBN"
model.roi_heads.res5.stride_in_1x1 = False
