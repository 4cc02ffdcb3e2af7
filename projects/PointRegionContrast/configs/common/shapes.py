"""What the recipes on Shapes share: small views of small scenes, a short run."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.data.shapes import shapes

from .point_region import dataloader, lr_multiplier, optimizer, train

dataset = dataloader.train.dataset
dataset.names = L(shapes)(split="unlabeled", size=1000, side=96, level="easy")
dataset.views.size = 64
dataset.views.cells = 16  # of 4 x 4 pixels
dataset.views.points = 4  # of a cell's 4 places on an 8 x 8 map; 16 take a CPU four times as long
dataset.views.photometry.blur_sigma = (0.1, 0.6)  # 2.0 pixels of a 224 view
del dataset
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = 1

optimizer.lr = 0.8  # 0.8 * 32 / 256 = 0.1
train.epochs = 10  # 310 iters = 10 ep * 31 iters/ep, 1,000 images / 32 a batch
train.log_period = 10
train.checkpointer.period = 100


def for_a_short_run(model: DictConfig) -> DictConfig:
    """What a few hundred steps from random weights need, as for MoCo v2 on Shapes."""
    model.queue.length = 512  # of 1,000 images; 65,536 keys would hold each of them dozens of times
    model.momentum.value = 0.99
    model.head.norm = "SyncBN"  # without a norm all embeddings stay nearly the same
    model.temperature = 0.1
    model.zero_init = False  # most of the run would pass before the blocks take part
    return model
