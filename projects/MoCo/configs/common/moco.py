"""What all MoCo recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.data.two_crops import TwoCrops
from region_pretrain.projects.moco import moco

_shared = get_config("common/moco_family.py")
optimizer, lr_multiplier, train = _shared.optimizer, _shared.lr_multiplier, _shared.train
dataloader = _shared.dataloader

dataloader.train.dataset.views = L(TwoCrops)(
    size=224,
    first_photometry=_shared.photometry,
    second_photometry=_shared.photometry,
    crop_area=(0.2, 1.0),
)


def pretrain(detector: DictConfig) -> DictConfig:
    """MoCo v2 for 200 epochs (``--method moco``).

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=200, output_dir="output/moco")
    return moco(detector)
