"""Mask R-CNN ConvNeXt-T FPN with timm's ConvNeXt, COCO 1x, AdamW; the schedule is ours."""

from detectron2.config import LazyCall as L

from region_pretrain.modeling.timm_backbone import TimmBackbone

from .mask_rcnn_swin_t_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(TimmBackbone)(name="convnext_tiny", drop_path_rate=0.2)
model.backbone.in_features = ("res2", "res3", "res4", "res5")
optimizer.params.layer_decay = 0.95
