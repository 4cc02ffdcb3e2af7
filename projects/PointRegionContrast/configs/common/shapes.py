"""What the recipes on Shapes share: small views, few points, a short run."""

from omegaconf import DictConfig

from region_pretrain.config import get_config

from .point_region import dataloader, lr_multiplier, optimizer, train

_shapes = get_config("common/shapes_pretrain.py")
dataloader.merge_with(_shapes.dataloader)
train.merge_with(_shapes.train)
_views = dataloader.train.dataset.views
_views.size = 64
_views.cells = 16  # of 4 x 4 pixels
_views.points = 4  # per region, which has 4 places on an 8 x 8 map; 16 are 4 times slower on a CPU
_views.photometry.blur_sigma = (0.1, 0.6)  # (0.1, 2.0) scaled from views of 224 to 64 pixels

optimizer.lr = 0.8  # 0.8 * 32 / 256 = 0.1


def for_a_short_run(model: DictConfig) -> DictConfig:
    """Adapt a model to a few hundred steps from random weights, as MoCo v2 on Shapes."""
    model.queue.length = 512  # 65,536 keys would contain each of the 1,000 images dozens of times
    model.momentum.value = 0.99
    model.head.norm = "SyncBN"  # without a norm all embeddings stay nearly identical
    model.temperature = 0.1
    model.zero_init = False  # the residual blocks would not contribute for most of the run
    return model
