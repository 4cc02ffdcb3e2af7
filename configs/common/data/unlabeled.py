"""Unlabelled images for pre-training; a method adds ``dataset.views``."""

from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.loader import PretrainLoader

dataloader = OmegaConf.create()
dataloader.train = L(PretrainLoader)(
    dataset=L(PretrainDataset)(
        # Registered data sets, or "folder://DIR"; a list is joined.
        names="imagenet_train",
        views=None,
        # The store that tools/make_regions.py wrote, and the recipe it must have been made with.
        regions="regions/imagenet_train.arrow",
        recipe="soco-v1",
        # Share of the images that may be missing from the store (files that could not be read).
        max_unreadable=0.01,
        # Widen the filter where a view shrinks the image; False is faster, and aliases.
        antialias=True,
        # True accepts a store of annotated boxes, which is no pre-training without labels.
        allow_ground_truth=False,
    ),
    # Images of one optimiser step, over all processes.
    total_batch_size=2048,
    # A process.
    num_workers=4,
    seed="${train.seed}",
    pin_memory=True,
)
