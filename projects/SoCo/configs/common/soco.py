"""What all SoCo recipes share. Leaves choose detector, views, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.projects.soco import SoCoViews, soco

optimizer = get_config("common/optim.py").lars
lr_multiplier = get_config("common/schedule.py").pretrain
train = get_config("common/train.py").train
dataloader = get_config("common/data/unlabeled.py").dataloader

train.base_batch_size = 256  # lr 1.0 * 2048 / 256 = 8.0
train.amp.enabled = True
train.channels_last = True
train.cudnn_benchmark = True
train.checkpointer.period = 2000
train.checkpoint_keep_every = 10000

dataloader.train.total_batch_size = 2048
dataloader.train.dataset.regions = "regions/imagenet_train.arrow"
dataloader.train.dataset.recipe = "soco-v1"
_augmentation = get_config("common/byol_augmentation.py")
dataloader.train.dataset.views = L(SoCoViews)(
    sizes=[224, 224, 112],
    # As released, view 3 is an independent crop. In the paper's figure it is view 2 at half the
    # size: ["crop", 0].
    sources=["crop", "crop"],
    first_photometry=_augmentation.first,
    other_photometry=_augmentation.second,
    num_regions=4,
    crop_area=(0.5, 1.0),
    jitter_prob=0.5,
    jitter_ratio=0.1,
    min_box_side=0.0,
    # Cover a square of each region; 0.5 in the released scripts of C4 and of 100 epochs.
    cutout_prob=0.0,
    cutout_area=(0.1, 0.3),
)


#: The C4 variant: two views, no box jitter.
C4_VIEWS = dict(sizes=[224, 224], sources=["crop"], crop_area=(0.6, 1.0), jitter_prob=0.0)


def pretrain(detector: DictConfig) -> DictConfig:
    """SoCo for 100 epochs (``--method soco``), with the views of the C4 variant for res5.

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=100, output_dir="output/soco")
    model = soco(detector)
    if model.head_name == "roi_heads.res5":
        dataloader.train.dataset.views.update(C4_VIEWS)
    return model
