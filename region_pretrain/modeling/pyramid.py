"""Features of a backbone for views of any size."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.modeling.backbone import FPN, Backbone
from torch import Tensor


def pyramid_features(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Run a detector's backbone on a batch of views.

    Detectron2's FPN doubles the coarser map and so needs sides that divide by 32, for which the
    detector pads its images. A view of 112 pixels is not padded: its maps are 28, 14, 7 and 4
    pixels wide and the coarser map is brought to the finer one's size. Where sides do divide,
    this is ``backbone(images)`` itself, and every other backbone is called as it is.

    Args:
        backbone: the detector's own.
        images: ``(B, 3, H, W)``, normalised.

    Returns:
        Maps by the backbone's names, finest first, without those of an FPN's top block when the
        sides do not divide.
    """
    divides = all(side % max(backbone.size_divisibility, 1) == 0 for side in images.shape[-2:])
    if divides or not isinstance(backbone, FPN):
        return backbone(images)
    bottom_up = backbone.bottom_up(images)
    # lateral_convs and output_convs are ordered from the coarsest level to the finest.
    names = list(reversed(backbone.in_features))
    features: list[Tensor] = []
    top_down = None
    for name, lateral, output in zip(
        names, backbone.lateral_convs, backbone.output_convs, strict=True
    ):
        here = lateral(bottom_up[name])
        if top_down is not None:
            here = here + F.interpolate(top_down, size=here.shape[-2:], mode="nearest")
            if backbone._fuse_type == "avg":
                here = here / 2
        top_down = here
        features.insert(0, output(here))
    return dict(zip(backbone._out_features, features, strict=False))
