"""A narrow detector for 64-pixel images: a step takes a few hundredths of a second."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from omegaconf import DictConfig

import region_pretrain as rp

#: Overrides of every pre-training of SoCo in these tests.
SMALL = [
    "dataloader.train.dataset.views.sizes=[64,64,32]",
    "dataloader.train.num_workers=0",
    "train.device=cpu",
    "train.amp.enabled=False",
    "train.log_period=1",
    "model.projector.hidden_dim=32",
    "model.predictor.hidden_dim=32",
]
CPU = ["train.device=cpu", "dataloader.train.num_workers=0", "train.log_period=1"]


def narrow_config() -> DictConfig:
    """The Mask R-CNN of Shapes with a third of the channels and BN."""
    cfg = rp.get_config("detection/mask_rcnn_r18_fpn_shapes.py")
    model, heads = cfg.model, cfg.model.roi_heads
    model.backbone.bottom_up.stem.update(out_channels=8, norm="BN")
    model.backbone.bottom_up.stages.update(channels=8, norm="BN")
    model.backbone.update(out_channels=16, norm="BN")
    model.proposal_generator.head.in_channels = 16
    heads.box_head.update(
        input_shape=ShapeSpec(channels=16, height=7, width=7),
        conv_dims=[16],
        fc_dims=[32],
        conv_norm="BN",
    )
    heads.box_predictor.input_shape = ShapeSpec(channels=32)
    mask_shape = ShapeSpec(channels=16, height=14, width=14)
    heads.mask_head.update(input_shape=mask_shape, conv_dims=[16, 16], conv_norm="BN")
    return cfg
