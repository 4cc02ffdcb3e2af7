"""mask_rcnn_r50_fpn_4conv1fc_3x.py with SoCo's weight decay, to be reported along with the AP."""

from .mask_rcnn_r50_fpn_4conv1fc_3x import dataloader, lr_multiplier, model, optimizer, train

optimizer.weight_decay = 2.5e-5
