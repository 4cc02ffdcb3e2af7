"""MCL's data, optimiser and length on Shapes: minutes on two CPU cores."""

from detectron2.config import LazyCall as L

from region_pretrain.data.shapes import shapes

from .mcl import dataloader, lr_multiplier, mcl_fpn, optimizer, supervised_fpn, train

DETECTOR = "detection/mask_rcnn_r18_fpn_shapes.py"
LEVEL_WEIGHTS = [1 / 2, 1 / 4, 1 / 4]

dataset = dataloader.train.dataset
dataset.names = L(shapes)(split="unlabeled", size=1000, side=96, level="easy")
# Canvases of 112 pixels: tiles of 112, 56, 28 on P4, P3, P2. P5 would need canvases of 224, four
# times the work; its output convolution keeps its first values.
dataset.views.montage.size = 112
dataset.views.montage.ratios = [1, 2, 4]
dataset.views.montage.images_per_canvas = [1, 4, 16]
dataset.views.query_photometry.blur_sigma = (0.1, 1.0)  # 2.0 pixels of a 224 view
dataset.views.key_photometry.blur_sigma = (0.1, 1.0)
del dataset
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = 1

optimizer.lr = 4.0  # 4.0 * 32 / 256 = 0.5
train.epochs = 10  # 310 iters = 10 ep * 31 iters/ep, 1,000 images / 32 a batch
lr_multiplier.warmup_epochs = 1
lr_multiplier.warmup_factor = 0.01
train.amp.enabled = False
train.channels_last = False
train.log_period = 10
train.checkpointer.period = 100
