"""MoCo v2 around the small Mask R-CNN of Shapes: minutes on two CPU cores."""

from detectron2.config import LazyCall as L

from region_pretrain.config import get_config
from region_pretrain.data.shapes import shapes

from .common.moco import dataloader, lr_multiplier, moco, optimizer, train

model = moco(
    get_config("detection/mask_rcnn_r18_fpn_shapes.py").model, trunk_dim=192, hidden_dim=512, dim=64
)
model.queue.length = 512  # of 1,000 images; 65,536 keys would hold each of them dozens of times
model.momentum.value = 0.99  # a short run; 0.97 lets age tell the queue's keys from the positive
# Without a norm in the head all embeddings are still nearly the same after 300 steps.
model.head.norm = "SyncBN"
model.temperature = 0.1

dataset = dataloader.train.dataset
dataset.names = L(shapes)(split="unlabeled", size=1000, side=96, level="easy")
dataset.views.size = 64
dataset.views.first_photometry.blur_sigma = (0.1, 0.6)  # 2.0 pixels of a 224 view
dataset.views.second_photometry.blur_sigma = (0.1, 0.6)
del dataset
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = 1

optimizer.lr = 0.3  # 0.3 * 32 / 256 = 0.0375
train.epochs = 10  # 310 iters = 10 ep * 31 iters/ep, 1,000 images / 32 a batch
train.log_period = 10
train.checkpointer.period = 100
train.output_dir = "output/moco-v2_r18_shapes"
