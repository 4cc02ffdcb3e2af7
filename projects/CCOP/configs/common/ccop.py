"""What all CCOP recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.projects.ccop import CCOPViews, ccop

_shared = get_config("common/moco_family.py")
optimizer, lr_multiplier, train = _shared.optimizer, _shared.lr_multiplier, _shared.train
dataloader = _shared.dataloader

optimizer.lr = 0.3
lr_multiplier.update(warmup_epochs=10, warmup_factor=1e-4, rescale=False)
train.checkpointer.period = 2310  # 5 ep of COCO
train.checkpoint_keep_every = 23_100  # 50 ep

_dataset = dataloader.train.dataset
_dataset.names = "coco_2017_train_images"
_dataset.regions = "regions/coco_2017_train_ccop.arrow"
_dataset.recipe = "ccop-v1"
_dataset.views = L(CCOPViews)(
    size=224,
    photometry=_shared.photometry,
    num_regions=50,
    crop_areas=[(0.1, 1.0), (0.1, 1.0)],
    min_visible=0.6,
    min_area=144.0,
)
_dataset.views.photometry.saturation = 0.2


def pretrain(detector: DictConfig) -> DictConfig:
    """CCOP for 200 epochs (``--method ccop``).

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=200, output_dir="output/ccop")
    return ccop(detector)
