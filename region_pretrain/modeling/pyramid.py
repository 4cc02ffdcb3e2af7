"""Backbone features of views of any size, and of the pyramid levels a method reads."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch.nn.functional as F
from detectron2.modeling.backbone import FPN, Backbone
from torch import Tensor

logger = logging.getLogger(__name__)


def pyramid_features(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Run a detector's backbone on a batch of views.

    Detectron2's FPN upsamples the coarser map by two, so sides must be divisible by 32; the
    detector pads its images to that. A view of 112 pixels is not padded: its maps are 28, 14, 7
    and 4 pixels wide, and the coarser map is resized to the finer one. If the sides are divisible,
    or the backbone has no FPN, this is ``backbone(images)`` itself.

    Args:
        backbone: the detector's.
        images: ``(B, 3, H, W)``, normalised.

    Returns:
        Maps by the backbone's names, finest first, without those of an FPN's top block if the
        sides are not divisible.
    """
    divides = all(side % max(backbone.size_divisibility, 1) == 0 for side in images.shape[-2:])
    if divides or not isinstance(backbone, FPN):
        return backbone(images)
    return trunk_and_pyramid_features(backbone, images)[1]


def trunk_and_pyramid_features(
    backbone: FPN, images: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a detector's FPN on a batch of views, and keep the trunk's maps as well.

    Args:
        backbone: the detector's.
        images: ``(B, 3, H, W)``, normalised; the sides need not be divisible by 32.

    Returns:
        The maps of the trunk (``res2``, ...), and those of :func:`pyramid_features` without the
        top block's, both by the backbone's names, finest first.
    """
    bottom_up = backbone.bottom_up(images)
    reads = dict.fromkeys(pyramid_names(backbone), slice(0, len(images)))
    return bottom_up, _top_down(backbone, bottom_up, reads)


def pyramid_maps(
    backbone: Backbone, images: Tensor, reads: Mapping[str, slice]
) -> dict[str, Tensor]:
    """Compute only the pyramid maps that are read, and each only for the images it is read for.

    An FPN's lateral and output convolutions are most of its work on the finer levels. Lateral
    convolutions run on the images whose map of that level or a finer one is read, output
    convolutions on those whose map of that level is; levels finer than all that are read are
    skipped. In training mode their norms see these images only.

    Args:
        backbone: the detector's. One that is not Detectron2's FPN runs completely.
        images: ``(B, 3, H, W)``, normalised. Sides need not be divisible by the FPN's size
            divisibility: a coarser map is resized to the finer one that it is added to.
        reads: map name -> images to return, a slice with bounds and step 1. Maps of an FPN's top
            block cannot be read.

    Returns:
        For each name in ``reads`` the map of ``images[reads[name]]``.
    """
    if not isinstance(backbone, FPN):
        maps = backbone(images)
        return {name: maps[name][span] for name, span in reads.items()}
    return _top_down(backbone, backbone.bottom_up(images), reads)


def _top_down(
    backbone: FPN, bottom_up: Mapping[str, Tensor], reads: Mapping[str, slice]
) -> dict[str, Tensor]:
    names = pyramid_names(backbone)[::-1]  # coarsest first, like the convolutions
    sources = reversed(backbone.in_features)
    layers = zip(names, sources, backbone.lateral_convs, backbone.output_convs, strict=True)
    found: dict[str, Tensor] = {}
    top_down, low = None, 0  # `top_down` is of the images from `low` on
    for k, (name, source, lateral, output) in enumerate(layers):
        ahead = [reads[n] for n in names[k:] if n in reads]
        if not ahead:
            break
        start, stop = min(span.start for span in ahead), max(span.stop for span in ahead)
        here = lateral(bottom_up[source][start:stop])
        if top_down is not None:
            above = top_down[start - low : stop - low]
            here = here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            if backbone._fuse_type == "avg":
                here = here / 2
        top_down, low = here, start
        if name in reads:
            span = reads[name]
            found[name] = output(here[span.start - low : span.stop - low])
    return {name: found[name] for name in reads}


def freeze_unread(backbone: Backbone, names: Collection[str]) -> list[str]:
    """Freeze those of an FPN's convolutions that none of the maps that are read depends on.

    :func:`pyramid_maps` does not run them, and DDP would wait for their gradients.

    Args:
        backbone: the detector's. Of one that is not Detectron2's FPN nothing is frozen.
        names: maps that are read.

    Returns:
        Names of the frozen convolutions in the backbone, such as ``fpn_output2``.
    """
    if not isinstance(backbone, FPN):
        return []
    coarsest_first = pyramid_names(backbone)[::-1]  # like the convolutions
    finest = max(coarsest_first.index(name) for name in names)
    outputs = zip(coarsest_first, backbone.output_convs, strict=True)
    unread = [
        *backbone.lateral_convs[finest + 1 :],
        *(output for name, output in outputs if name not in names),
    ]
    for convolution in unread:
        convolution.requires_grad_(False)
    frozen = [name for name, module in backbone.named_children() if module in unread]
    if frozen:
        read = ", ".join(sorted(set(names)))
        logger.info("only %s of the FPN is read: %s are not trained", read, ", ".join(frozen))
    return frozen


def pyramid_names(backbone: Backbone) -> list[str]:
    """Names of a backbone's maps, finest first, without those of an FPN's top block."""
    names = list(backbone.output_shape())
    return names[: len(backbone.in_features)] if isinstance(backbone, FPN) else names
