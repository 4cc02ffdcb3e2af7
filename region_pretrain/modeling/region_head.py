"""Heads for pooled regions: those of detectors in the form that methods pre-train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn

from region_pretrain.errors import UserError


def as_module(stage: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """A head as a module; like the res5 of ``Res5ROIHeads`` it may be a list of blocks."""
    return stage if isinstance(stage, nn.Module) else nn.Sequential(*stage)


class SharedHeads(nn.ModuleList):
    """One box head for all stages of a Cascade R-CNN.

    Its state dict has the same weights for each stage, under the names of ``CascadeROIHeads``.

    Args:
        head: the first stage's box head.
        count: number of stages.
    """

    def __init__(self, head: nn.Module, count: int) -> None:
        super().__init__([head] * count)

    def forward(self, regions: Tensor) -> Tensor:
        """``(R, C, S, S)`` to the head's output."""
        return self[0](regions)


class Towers(nn.Module):
    """The towers of a one-stage detector's head on pooled regions.

    In the detector the towers run on complete maps. Both are trained: their outputs are
    concatenated.

    Args:
        cls_subnet, bbox_subnet: the convolutions before the predictors.
    """

    def __init__(self, cls_subnet: nn.Module, bbox_subnet: nn.Module) -> None:
        super().__init__()
        self.cls_subnet, self.bbox_subnet = cls_subnet, bbox_subnet

    def forward(self, regions: Tensor) -> Tensor:
        """``(R, C, S, S)`` to ``(R, C1 + C2, S, S)``."""
        return torch.cat([self.cls_subnet(regions), self.bbox_subnet(regions)], dim=1)


def towers(head: nn.Module) -> Towers:
    """The towers of a ``RetinaNetHead`` or ``FCOSHead``.

    Raises:
        UserError: they have a batch norm per level: a region of any level passes through them.
    """
    found = Towers(head.cls_subnet, head.bbox_subnet)
    if any(isinstance(module, CycleBatchNormList) for module in found.modules()):
        raise UserError(
            "the detector's head has a batch norm for each level, which pooled regions do not "
            "have: set its norm to GN or to an empty string"
        )
    return found


def add_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Add a head under its name in the detector.

    Args:
        model: a pre-training model.
        name: e.g. ``roi_heads.box_head``, or ``head``.
        head: the module.
    """
    parent, _, child = name.rpartition(".")
    if parent and not hasattr(model, parent):
        model.add_module(parent, nn.Module())
    model.get_submodule(parent).add_module(child, head)
