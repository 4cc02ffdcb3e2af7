"""BYOL around the small Mask R-CNN of Shapes: minutes on two CPU cores."""

from detectron2.config import LazyCall as L

from region_pretrain.config import get_config
from region_pretrain.data.shapes import shapes

from .common.byol import byol, dataloader, lr_multiplier, optimizer, train

model = byol(
    get_config("detection/mask_rcnn_r18_fpn_shapes.py").model,
    trunk_dim=192,
    hidden_dim=512,
    dim=128,
)
model.momentum.start = 0.97  # a short run: the target has to follow within dozens of steps

dataset = dataloader.train.dataset
dataset.names = L(shapes)(split="unlabeled", size=1000, side=96, level="easy")
dataset.views.size = 64
dataset.views.crop_area = (0.2, 1.0)
dataset.views.first_photometry.blur_sigma = (0.1, 0.6)  # 2.0 pixels of a 224 view
dataset.views.second_photometry.blur_sigma = (0.1, 0.6)
del dataset
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = 1

optimizer.lr = 4.0  # 4.0 * 32 / 256 = 0.5
optimizer.params.weight_decay = 1e-5
train.epochs = 10  # 310 iters = 10 ep * 31 iters/ep, 1,000 images / 32 a batch
lr_multiplier.warmup_epochs = 1
lr_multiplier.warmup_factor = 0.01
train.amp.enabled = False
train.channels_last = False
train.log_period = 10
train.checkpointer.period = 100
train.output_dir = "output/byol_r18_shapes"
