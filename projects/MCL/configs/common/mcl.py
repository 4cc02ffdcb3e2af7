"""What all MCL recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.projects.mcl import (
    IMAGES_PER_CANVAS,
    MCLViews,
    Montage,
    mcl,
    mcl_param_groups,
    tile_ratios,
)
from region_pretrain.solver import warmup_times_cosine

optimizer = get_config("common/optim.py").lars
optimizer.params = L(mcl_param_groups)(weight_decay=1e-5, released_exclusions=False)
optimizer.form = "original"

# The cosine spans all epochs and is multiplied by the warm-up.
lr_multiplier = L(warmup_times_cosine)(
    epochs="${train.epochs}",
    warmup_epochs=10,
    warmup_factor=1e-4,
    final_factor=6.25e-6,  # 1e-4 of 16.0
)

train = get_config("common/train.py").train
train.base_batch_size = 256  # lr 1.0 * 4096 / 256 = 16.0
train.amp.enabled = True
train.channels_last = True
train.cudnn_benchmark = True
train.clip_grad.enabled = True
train.clip_grad.max_norm = 500.0
train.checkpointer.period = 1248  # 4 epochs of 312

dataloader = get_config("common/data/unlabeled.py").dataloader
dataloader.train.total_batch_size = 4096
dataloader.train.num_workers = 7
dataloader.train.dataset.labels = False
_augmentation = get_config("common/byol_augmentation.py")
dataloader.train.dataset.views = L(MCLViews)(
    montage=L(Montage)(
        size=224,
        ratios=[1, 2, 4, 8],  # tiles of 224, 112, 56, 28 pixels on P5, P4, P3, P2
        images_per_canvas=[1, 4, 16, 32],  # 128, 32, 8, 4 canvases for 128 images
        shrink="nearest",  # as released; "area" and "bilinear" do not alias
    ),
    query_photometry=_augmentation.first,
    key_photometry=_augmentation.second,
    crop_area=(0.2, 1.0),
)


def pretrain(detector: DictConfig) -> DictConfig:
    """MCL for 100 epochs (``--method mcl``), with tiles on the detector's levels.

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=100, output_dir="output/mcl")
    ratios = tile_ratios(detector)
    dataloader.train.dataset.views.montage.update(
        ratios=ratios, images_per_canvas=[IMAGES_PER_CANVAS[ratio] for ratio in ratios]
    )
    return mcl(detector)
