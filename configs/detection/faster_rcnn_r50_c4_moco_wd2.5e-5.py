"""faster_rcnn_r50_c4_moco.py with SoCo's weight decay, to be reported along with the AP."""

from .faster_rcnn_r50_c4_moco import dataloader, lr_multiplier, model, optimizer, train

optimizer.weight_decay = 2.5e-5
