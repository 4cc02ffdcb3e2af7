"""InfoMin's COCO protocol: mask_rcnn_r50_fpn_4conv1fc.py with 14x14 box pooling and AMP.

The published yaml sets no pooler resolution, so Detectron2's default of 14 applies. CCOP's script
fine-tunes with it. Its AP is not comparable to that of a 7x7 head.
"""

from detectron2.layers import ShapeSpec

from .mask_rcnn_r50_fpn_4conv1fc import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_pooler.output_size = 14
model.roi_heads.box_head.input_shape = ShapeSpec(channels=256, height=14, width=14)
train.amp.update(enabled=True, dtype="float16")
