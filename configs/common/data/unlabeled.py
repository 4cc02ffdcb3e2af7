"""Unlabelled images for pre-training; a method sets ``views`` and, if needed, the region store."""

from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.loader import PretrainLoader

dataloader = OmegaConf.create()
dataloader.train = L(PretrainLoader)(
    dataset=L(PretrainDataset)(
        # A registered data set, "folder://DIR", or a list of these, which are concatenated.
        names="imagenet_train",
        views=None,
        # Region store written by tools/make_regions.py, and the recipe it must have been made with;
        # null for methods without regions.
        regions=None,
        recipe=None,
        # Maximum fraction of images missing from the store (files that could not be read).
        max_unreadable=0.01,
        # Filter before a view shrinks the image; False is faster but aliases.
        antialias=True,
        # Accept a store of annotated boxes: pre-training is then no longer without labels.
        allow_ground_truth=False,
    ),
    # Images per optimiser step, over all processes.
    total_batch_size=256,
    # Per process.
    num_workers=4,
    seed="${train.seed}",
    pin_memory=True,
)
