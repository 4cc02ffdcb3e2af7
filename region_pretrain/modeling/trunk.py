"""The part of a detector that image-level methods pre-train."""

from __future__ import annotations

import logging

from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)


class Trunk(nn.Module):
    """The trunk below a detector's FPN, for methods that look at whole images.

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
            "an image-level method: it trains backbone.bottom_up only; FPN, RPN and all heads "
            "start anew in the detector"
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C)``: the last map of ``(B, 3, H, W)`` images, averaged over space."""
        return self.bottom_up(images)[self.feature].mean(dim=(2, 3))
