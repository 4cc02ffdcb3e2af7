"""Features of a backbone for views of any size."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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
    return _pyramid(backbone, backbone.bottom_up(images))


def trunk_and_pyramid_features(
    backbone: FPN, images: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a detector's FPN on a batch of views, and keep what its trunk gave.

    Args:
        backbone: the detector's own.
        images: ``(B, 3, H, W)``, normalised; the sides need not divide by 32.

    Returns:
        The maps of the trunk (``res2``, ...), and those of :func:`pyramid_features` without the
        top block's, both by the backbone's names, finest first.
    """
    bottom_up = backbone.bottom_up(images)
    return bottom_up, _pyramid(backbone, bottom_up)


def _pyramid(backbone: FPN, bottom_up: dict[str, Tensor]) -> dict[str, Tensor]:
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


def pyramid_maps(
    backbone: Backbone, images: Tensor, reads: Mapping[str, slice]
) -> dict[str, Tensor]:
    """Only those maps of a pyramid that are read, of only those images that they are read of.

    An FPN's lateral and output convolutions are most of its work on the finer levels. Lateral
    convolutions run on the images of which their own or a finer map is read, output convolutions
    on those of which their own is; finer levels than the finest that is read are left out. In
    training mode the statistics of their norms are those of the images that they see.

    Args:
        backbone: the detector's own; another one than Detectron2's FPN is run as it is.
        images: ``(B, 3, H, W)``, normalised; sides divide by the backbone's size divisibility.
        reads: for each map's name the images to give, as a slice with bounds and step 1. Not those
            of an FPN's top block.

    Returns:
        For each name in ``reads`` the map of ``images[reads[name]]``.
    """
    if not isinstance(backbone, FPN):
        maps = backbone(images)
        return {name: maps[name][span] for name, span in reads.items()}
    bottom_up = backbone.bottom_up(images)
    names = pyramid_names(backbone)[::-1]  # coarsest first, as the convolutions are
    sources = reversed(backbone.in_features)
    layers = zip(names, sources, backbone.lateral_convs, backbone.output_convs, strict=True)
    found: dict[str, Tensor] = {}
    top_down, low = None, 0
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
    return found


def freeze_unread(backbone: Backbone, names: Collection[str]) -> list[str]:
    """Take the gradient from those of an FPN's convolutions that no map of interest needs.

    :func:`pyramid_maps` does not run them, and a parameter that waits for a gradient in vain stops
    a run of several processes.

    Args:
        backbone: the detector's own; of another one than Detectron2's FPN nothing is frozen.
        names: of the maps that are read.

    Returns:
        The convolutions' names in the backbone, such as ``fpn_output2``.
    """
    if not isinstance(backbone, FPN):
        return []
    levels = pyramid_names(backbone)
    finest = min(levels.index(name) for name in names)
    frozen = []
    for name, module in backbone.named_children():
        if not name.startswith(("fpn_lateral", "fpn_output")):
            continue
        convs = backbone.lateral_convs if "lateral" in name else backbone.output_convs
        level = len(levels) - 1 - list(convs).index(module)  # they are ordered coarsest first
        if level < finest or ("output" in name and levels[level] not in names):
            module.requires_grad_(False)
            frozen.append(name)
    return frozen


def pyramid_names(backbone: Backbone) -> list[str]:
    """Names of a backbone's maps, finest first, without those of an FPN's top block."""
    names = list(backbone.output_shape())
    return names[: len(backbone.in_features)] if isinstance(backbone, FPN) else names
