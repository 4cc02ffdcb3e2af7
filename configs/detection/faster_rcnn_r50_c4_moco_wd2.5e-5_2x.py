"""faster_rcnn_r50_c4_moco_2x.py with SoCo's weight decay, to be reported along with the AP."""

from .faster_rcnn_r50_c4_moco_2x import dataloader, lr_multiplier, model, optimizer, train

optimizer.weight_decay = 2.5e-5
