"""Detectron2's Mask R-CNN with FPN, narrow: 65 thousand parameters."""

from __future__ import annotations

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from torch import nn


def detector_config(blocks: int = 1, width: int = 16, classes: int = 3, norm: str = "BN"):
    """Detectron2's Mask R-CNN with FPN, narrow: 65 thousand parameters."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up.stem.update(out_channels=8, norm=norm)
    model.backbone.bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=blocks,
            stride_per_block=[stride] + [1] * (blocks - 1),
            in_channels=inputs,
            out_channels=outputs,
            norm=norm,
        )
        for inputs, outputs, stride in ((8, 8, 1), (8, 16, 2), (16, 16, 2), (16, 32, 2))
    ]
    model.backbone.update(out_channels=width, norm=norm)
    model.proposal_generator.head.in_channels = width
    model.roi_heads.num_classes = classes
    box_head = model.roi_heads.box_head
    box_head.update(input_shape=ShapeSpec(channels=width, height=7, width=7), fc_dims=[32])
    model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=32)
    shape = ShapeSpec(channels=width, height=14, width=14)
    model.roi_heads.mask_head.update(input_shape=shape, conv_dims=[16, 16])
    return model


def build(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    model = instantiate(detector_config(**kwargs))
    with torch.no_grad():  # buffers that a load has to change, too
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.ndim == 1:
                buffer.uniform_(0.5, 1.5)
    return model


def state(model: nn.Module, *prefixes: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(prefixes)}


def save(tmp_path, content, name="model_final.pth") -> str:
    path = tmp_path / name
    torch.save(content, path)
    return str(path)


PRETRAINED = ("backbone.", "roi_heads.box_head.")
