"""The trunk of a detector: below its feature pyramid, and the most of the work."""

from __future__ import annotations

import logging

from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)


class Trunk(nn.Module):
    """The trunk below a detector's FPN, for methods that look at whole images or at its last map.

    A model that holds it as ``backbone`` writes checkpoints of ``backbone.bottom_up.*`` and of
    nothing else: FPN, RPN and heads of the detector start anew, which the log says.

    Args:
        bottom_up: the detector's ``backbone.bottom_up``.
        feature: name of its last map.

    Raises:
        UserError: the trunk has no such map.
    """

    def __init__(self, bottom_up: Backbone, feature: str = "res5") -> None:
        super().__init__()
        maps = bottom_up.output_shape()
        if feature not in maps:
            raise UserError(f"model.backbone.feature={feature}: the trunk gives {', '.join(maps)}")
        self.bottom_up = bottom_up
        self.feature = feature
        logger.info(
            "this method trains backbone.bottom_up only; FPN, RPN and all heads start anew in the "
            "detector"
        )

    def last_map(self, images: Tensor) -> Tensor:
        """``(B, C, h, w)``: the last map of ``(B, 3, H, W)`` images."""
        return self.bottom_up(images)[self.feature]

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C)``: the last map of ``(B, 3, H, W)`` images, averaged over space."""
        return self.last_map(images).mean(dim=(2, 3))


def compile_trunks(model: nn.Module) -> None:
    """``torch.compile`` the trunks of a model in place; names in its state dict stay.

    Nearly all the work is theirs, and their shapes hardly ever change, while what goes on around
    them (which box goes on which level, which pairs match) does from batch to batch. A model
    without a Detectron2 backbone is compiled whole.
    """
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    outer = {b for b in backbones for c in b.modules() if c is not b and isinstance(c, Backbone)}
    for module in [b for b in backbones if b not in outer] or [model]:
        module.compile()
