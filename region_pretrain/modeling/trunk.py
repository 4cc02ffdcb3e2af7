"""The trunk of a detector: its backbone below the feature pyramid."""

from __future__ import annotations

import logging

from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)


class Trunk(nn.Module):
    """The trunk below a detector's FPN, for methods that read its last map or an average of it.

    As a model's ``backbone`` it trains ``backbone.bottom_up.*`` and nothing else: the detector's
    FPN, RPN and heads keep their random initialisation, which the log states.

    Args:
        bottom_up: the detector's ``backbone.bottom_up``.
        feature: name of the last map.

    Raises:
        UserError: the trunk has no map of this name.
    """

    def __init__(self, bottom_up: Backbone, feature: str = "res5") -> None:
        super().__init__()
        maps = bottom_up.output_shape()
        if feature not in maps:
            raise UserError(f"model.backbone.feature={feature} must be one of {', '.join(maps)}")
        self.bottom_up = bottom_up
        self.feature = feature
        logger.info(
            "this method trains backbone.bottom_up only: the detector's FPN, RPN and heads will "
            "start from random weights"
        )

    def last_map(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to their last map ``(B, C, h, w)``."""
        return self.bottom_up(images)[self.feature]

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to their last map averaged over space, ``(B, C)``."""
        return self.last_map(images).mean(dim=(2, 3))


def compile_trunks(model: nn.Module) -> None:
    """``torch.compile`` the trunks of a model in place, without renaming its state dict's entries.

    They do nearly all the work and their shapes hardly ever change, while the code around them
    (which box is pooled from which level, which pairs match) depends on the batch. A model without
    a Detectron2 backbone is compiled completely.
    """
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    outer = {b for b in backbones for c in b.modules() if c is not b and isinstance(c, Backbone)}
    for module in [b for b in backbones if b not in outer] or [model]:
        module.compile()
