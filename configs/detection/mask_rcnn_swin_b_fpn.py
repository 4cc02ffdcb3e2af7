"""Mask R-CNN Swin-B FPN, COCO 1x, AdamW; the schedule is ours."""

from .mask_rcnn_swin_t_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(
    embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.3
)
