"""Backbone features of views of any size, and of the maps that a method reads."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import FPN, Backbone, SimpleFeaturePyramid
from torch import Tensor, nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.dry_run import copied_tensors, dry_run, example, output_of

logger = logging.getLogger(__name__)

_DEFORMABLE = ("DeformConv", "ModulatedDeformConv")  # absent where Detectron2 is not compiled


def trunk_and_pyramid_features(
    backbone: Backbone, images: Tensor, names: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a detector's feature pyramid on a batch of views, and keep the trunk's maps as well.

    Detectron2's FPN upsamples the coarser map by two, so sides must be divisible by 32; the
    detector pads its images to that. A view of 112 pixels is not padded: its maps are 28, 14, 7
    and 4 pixels wide (ConvNeXt's last one 3), and twice the coarser map is cropped or extended to
    the finer one.

    Args:
        backbone: the detector's.
        images: ``(B, 3, H, W)``, normalised.
        names: the pyramid's maps to return; None for those of :func:`pyramid_names`.

    Returns:
        The maps of the trunk (``res2``, ...), and those of the pyramid, both by the backbone's
        names. They are the same for a backbone without a pyramid.
    """
    maps = trunk_of(backbone)(images)
    names = pyramid_names(backbone) if names is None else names
    return maps, _levels(backbone, images, maps, dict.fromkeys(names, slice(0, len(images))))


def pyramid_maps(
    backbone: nn.Module, images: Tensor, reads: Mapping[str, slice]
) -> dict[str, Tensor]:
    """Compute only the pyramid maps that are read, and each only for the images it is read for.

    An FPN's lateral and output convolutions are most of its work on the finer levels. Lateral
    convolutions run on the images whose map of that level or a finer one is read, output
    convolutions on those whose map of that level is; levels finer than all that are read are
    skipped. In training mode their norms see these images only. The levels of ViTDet's simple
    feature pyramid do not depend on each other.

    Args:
        backbone: the detector's. One that is neither of the two, or a subclass of them with a
            ``forward`` of its own, runs completely.
        images: ``(B, 3, H, W)``, normalised. Sides need not be divisible by the FPN's size
            divisibility, see :func:`trunk_and_pyramid_features`.
        reads: map name -> images to return, a slice with bounds and step 1. Maps of a top block
            cannot be read.

    Returns:
        For each name in ``reads`` the map of ``images[reads[name]]``.
    """
    return _levels(backbone, images, trunk_of(backbone)(images), reads)


def trunk_of(backbone: nn.Module) -> nn.Module:
    """The trunk below a feature pyramid; a backbone without a pyramid is its own trunk."""
    name = trunk_name(backbone)
    return getattr(backbone, name) if name else backbone


def trunk_name(backbone: nn.Module) -> str:
    """Name of the trunk in a backbone's feature pyramid; ``""`` without a pyramid."""
    if isinstance(backbone, FPN):
        return "bottom_up"
    return "net" if isinstance(backbone, SimpleFeaturePyramid) else ""


def _levels(
    backbone: nn.Module,
    images: Tensor,
    trunk: Mapping[str, Tensor],
    reads: Mapping[str, slice],
) -> dict[str, Tensor]:
    if _has_own_forward(backbone):
        maps = _complete(backbone, images, trunk)
        return {name: maps[name][span] for name, span in reads.items()}
    if isinstance(backbone, FPN):
        return _top_down(backbone, trunk, reads)
    if isinstance(backbone, SimpleFeaturePyramid):
        stages = dict(zip(pyramid_names(backbone), backbone.stages, strict=True))
        source = trunk[backbone.in_feature]
        return {name: stages[name](source[span]) for name, span in reads.items()}
    return {name: trunk[name][span] for name, span in reads.items()}


def _has_own_forward(backbone: nn.Module) -> bool:
    """Whether a subclass of Detectron2's pyramids computes more, or something else."""
    return any(
        isinstance(backbone, kind) and type(backbone).forward is not kind.forward
        for kind in (FPN, SimpleFeaturePyramid)
    )


class _Given(nn.Module):
    """In place of a trunk: returns maps that have been computed."""

    def __init__(self, trunk: nn.Module, maps: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["_trunk"] = trunk  # not as a submodule
        self._maps = maps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def forward(self, _: object) -> Mapping[str, Tensor]:
        return self._maps


def _complete(
    backbone: nn.Module, images: Tensor, trunk: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All maps of a pyramid with a ``forward`` of its own, as it computes them itself."""
    if isinstance(backbone, FPN):
        sides = [trunk[name].shape[-2:] for name in backbone.in_features]
        for fine, coarse in zip(sides, sides[1:], strict=False):
            if any(a != 2 * b for a, b in zip(fine, coarse, strict=True)):
                raise UserError(
                    f"{type(backbone).__name__} has a forward of its own, which needs views whose "
                    f"sides are multiples of {backbone.size_divisibility} pixels: change the "
                    "method's view sizes"
                )
    name, network = trunk_name(backbone), trunk_of(backbone)
    setattr(backbone, name, _Given(network, trunk))
    try:
        return backbone(images)
    finally:
        setattr(backbone, name, network)


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
            here = here + _upsample(above, here.shape[-2:])
            if backbone._fuse_type == "avg":
                here = here / 2
        top_down, low = here, start
        if name in reads:
            span = reads[name]
            found[name] = output(here[span.start - low : span.stop - low])
    return {name: found[name] for name in reads}


def _upsample(coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """A map at twice its resolution, cropped, or extended by its last cells, to a size.

    Strides round sides up or, as ConvNeXt's, down; either way a cell covers the same two cells of
    the finer map.
    """
    height, width = size
    fine = F.interpolate(coarse, scale_factor=2, mode="nearest")[..., :height, :width]
    missing = 0, width - fine.shape[-1], 0, height - fine.shape[-2]
    return F.pad(fine, missing, mode="replicate") if any(missing) else fine


class _Reader(nn.Module):
    """The mean of the maps that a method reads."""

    def __init__(self, backbone: nn.Module, names: Collection[str], of_trunk: Collection[str]):
        super().__init__()
        self.backbone, self.names, self.of_trunk = backbone, names, of_trunk

    def forward(self, images: Tensor) -> Tensor:
        trunk, pyramid = trunk_and_pyramid_features(self.backbone, images, self.names)
        maps = [*pyramid.values(), *(trunk[name] for name in self.of_trunk)]
        return torch.stack([x.mean() for x in maps]).mean()


def _plain_convolution(
    layer: nn.Module, x: Tensor, offset: Tensor, mask: Tensor | None = None
) -> Tensor:
    """A deformable convolution without its shifts, which depends on the same tensors.

    Detectron2's has a backward pass on GPUs only.
    """
    bias = getattr(layer, "bias", None)
    groups = layer.groups
    x = F.conv2d(x, layer.weight, bias, layer.stride, layer.padding, layer.dilation, groups)
    x = x + 0 * (offset.mean() + (0 if mask is None else mask.mean()))
    x = x if layer.norm is None else layer.norm(x)
    return x if layer.activation is None else layer.activation(x)


def freeze_unread(
    backbone: nn.Module, names: Collection[str], of_trunk: Collection[str] = ()
) -> list[str]:
    """Freeze those of a backbone's parameters that none of the maps that are read depends on.

    They would get no gradient, and DDP would wait for it: an FPN's convolutions of unread levels
    and its top block, or a Swin Transformer's norms of unread maps. They are found by a backward
    pass on the meta device or, if the modules need values, of one image on the CPU.

    Args:
        backbone: the detector's, or a :class:`~region_pretrain.modeling.trunk.Trunk`.
        names: maps that are read with :func:`pyramid_maps`.
        of_trunk: maps of the trunk that are read.

    Returns:
        Names of the frozen modules in the backbone, such as ``fpn_output2``.

    Raises:
        UserError: the backbone needs values, and fails on the CPU.
    """
    reader = _Reader(backbone, names, of_trunk)
    trained = [name for name, p in reader.named_parameters() if p.requires_grad]
    if not trained:
        return []
    constraints = getattr(trunk_of(backbone), "padding_constraints", {})
    side = constraints.get("square_size") or 224
    # Reentrant checkpoints, as Swin's, do not allow autograd.grad.
    recomputing = [m for m in reader.modules() if getattr(m, "use_checkpoint", None) is True]
    deformable = [m for m in reader.modules() if type(m).__name__ in _DEFORMABLE]
    for module in recomputing:
        module.use_checkpoint = False
    for module in deformable:
        module.forward = partial(_plain_convolution, module)

    def compute() -> tuple[Tensor | None, ...]:
        tensors = copied_tensors(reader)
        # In eval mode: batch statistics would be exchanged between processes.
        mean = output_of(reader, example(1, 3, side, side), tensors=tensors)
        return torch.autograd.grad(mean, [tensors[name] for name in trained], allow_unused=True)

    try:
        gradients = dry_run(compute, f"the backbone {_kinds(backbone)}")
    finally:
        for module in recomputing:
            module.use_checkpoint = True
        for module in deformable:
            del module.forward
    pairs = zip(trained, gradients, strict=True)
    unread = {name.removeprefix("backbone.") for name, gradient in pairs if gradient is None}
    for name in unread:
        parameter = backbone.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.is_unread = True  # frozen by us, not by the detector's config
    frozen = _modules_of(backbone, unread)
    if frozen:
        read = ", ".join(sorted({*names, *of_trunk}))
        logger.info("maps read: %s; not trained: %s", read, ", ".join(frozen))
    return frozen


def _kinds(backbone: nn.Module) -> str:
    trunk = trunk_of(backbone)
    of_trunk = "" if trunk is backbone else f" with the trunk {type(trunk).__name__}"
    return f"{type(backbone).__name__}{of_trunk}"


def _modules_of(root: nn.Module, parameters: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are among those given."""
    found: list[str] = []
    for name, module in root.named_modules():
        own = [f"{name}.{key}".removeprefix(".") for key, _ in module.named_parameters()]
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if own and not inside and parameters.issuperset(own):
            found.append(name)
    return found


def pyramid_names(backbone: nn.Module) -> list[str]:
    """Names of a backbone's maps, finest first, without those of a top block."""
    names = list(backbone.output_shape())
    if isinstance(backbone, FPN):
        return names[: len(backbone.in_features)]
    return names[: len(backbone.stages)] if isinstance(backbone, SimpleFeaturePyramid) else names


def readable_names(backbone: nn.Module) -> list[str]:
    """Names of the maps that :func:`pyramid_maps` can read."""
    if _has_own_forward(backbone):
        return list(backbone.output_shape())
    return pyramid_names(backbone)
