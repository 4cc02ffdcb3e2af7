"""What all point-level region contrast recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.projects.point_region_contrast import PointRegionViews, point_region
from region_pretrain.projects.point_region_contrast.maps import region_maps

_shared = get_config("common/moco_family.py")
optimizer, lr_multiplier, train = _shared.optimizer, _shared.lr_multiplier, _shared.train
dataloader = _shared.dataloader

dataloader.train.dataset.views = L(PointRegionViews)(
    size=224,
    photometry=_shared.photometry,
    maps=L(region_maps)(kind="grid"),  # 4 x 4 cells of the image
    num_regions=16,
    points=16,
    positives="region",
    cells=56,  # of 4 x 4 pixels
    pairs=256,
    crop_area=(0.2, 1.0),
    min_overlap=0.5,
    max_draws=101,
)


def pretrain(detector: DictConfig) -> DictConfig:
    """Point-level region contrast for 200 epochs (``--method point_region``).

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=200, output_dir="output/point_region")
    return point_region(detector)
