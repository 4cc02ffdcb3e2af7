"""What all BYOL recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.data.two_crops import TwoCrops
from region_pretrain.projects.byol import byol

optimizer = get_config("common/optim.py").lars
lr_multiplier = get_config("common/schedule.py").pretrain
train = get_config("common/train.py").train
dataloader = get_config("common/data/unlabeled.py").dataloader

train.base_batch_size = 256
lr_multiplier.update(warmup_epochs=10, warmup_factor=0.0, final_factor=0.0)
train.amp.enabled = True
train.channels_last = True
train.cudnn_benchmark = True

dataloader.train.total_batch_size = 4096
_augmentation = get_config("common/byol_augmentation.py")
dataloader.train.dataset.views = L(TwoCrops)(
    size=224,
    first_photometry=_augmentation.first,
    second_photometry=_augmentation.second,
    crop_area=(0.08, 1.0),
)


def pretrain(detector: DictConfig) -> DictConfig:
    """BYOL for 100 epochs (``--method byol``).

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=100, output_dir="output/byol")
    optimizer.lr = 0.45
    optimizer.params.weight_decay = 1e-6
    return byol(detector)
