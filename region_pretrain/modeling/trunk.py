"""The trunk of a detector: its backbone below the feature pyramid."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.utils import comm
from torch import Tensor, nn
from torch.utils import checkpoint

from region_pretrain.errors import UserError
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps

logger = logging.getLogger(__name__)


class Trunk(nn.Module):
    """The trunk below a detector's feature pyramid, under the names it has in the detector.

    As a model's ``backbone``, ``Trunk(bottom_up=...)`` trains ``backbone.bottom_up.*`` and nothing
    else: the detector's FPN, RPN and heads keep their random initialisation, which the log states.

    Args:
        trunk: one keyword argument, the trunk by its name in the detector's backbone:
            ``bottom_up`` in an FPN, ``net`` in ViTDet's simple feature pyramid.
    """

    def __init__(self, **trunk: Backbone) -> None:
        super().__init__()
        ((self.name, module),) = trunk.items()
        self.add_module(self.name, module)
        logger.info(
            "this method trains backbone.%s only: the detector's pyramid, RPN and heads will start "
            "from random weights",
            self.name,
        )

    @property
    def size_divisibility(self) -> int:
        """As of Detectron2's ``Backbone``: sides of images must be multiples of it, if not 0."""
        return getattr(self, self.name).size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """As of Detectron2's ``Backbone``."""
        return getattr(self, self.name).padding_constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return getattr(self, self.name).output_shape()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` images to their maps by name."""
        return getattr(self, self.name)(images)


def prepare_map(backbone: nn.Module, feature: str) -> None:
    """Freeze those of a backbone's parameters that one of its maps does not depend on.

    Args:
        backbone: a detector's backbone or its :class:`Trunk`.
        feature: name of the map, read with :func:`read_map`.

    Raises:
        UserError: the backbone has no map of this name.
    """
    maps = backbone.output_shape()
    if feature not in maps:
        raise UserError(f"model.feature={feature} must be one of {', '.join(maps)}")
    freeze_unread(backbone, [feature])


def read_map(network: Mapping[str, nn.Module], images: Tensor, feature: str) -> Tensor:
    """Compute one map of a network.

    Args:
        network: ``backbone``, a detector's backbone or its :class:`Trunk`, and optionally ``res5``,
            the last stage of a C4 detector, which is applied to the complete map.
        images: ``(B, 3, H, W)``, normalised.
        feature: name of the backbone's map.

    Returns:
        ``(B, C, h, w)``.
    """
    reads = {feature: slice(0, len(images))}
    maps = pyramid_maps(network["backbone"], images, reads)[feature]
    return network["res5"](maps) if "res5" in network else maps


def use_plain_checkpoints(model: nn.Module) -> None:
    """Recompute activations in the backward pass itself, as PyTorch recommends.

    Detectron2's Swin leaves PyTorch's old default, in which each part runs a backward pass of its
    own: DDP then fails if a network is called twice in a step, as most methods do. The files in
    question import ``torch.utils.checkpoint`` under the name ``checkpoint``.
    """
    plain = partial(checkpoint.checkpoint, use_reentrant=False)
    for module in model.modules():
        if getattr(module, "use_checkpoint", None) is True:
            names = type(module).forward.__globals__
            if names.get("checkpoint") is checkpoint:
                names["checkpoint"] = SimpleNamespace(**{**vars(checkpoint), "checkpoint": plain})


def compile_trunks(model: nn.Module) -> None:
    """``torch.compile`` the trunks of a model in place, without renaming its state dict's entries.

    They do nearly all the work and their shapes hardly ever change, while the code around them
    (which box is pooled from which level, which pairs match) depends on the batch. A model without
    a Detectron2 backbone is compiled completely.

    With several processes each shape is compiled on its own: the norms that communicate have no
    kernels for shapes that are symbols.
    """
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    outer = {b for b in backbones for c in b.modules() if c is not b and isinstance(c, Backbone)}
    for module in [b for b in backbones if b not in outer] or [model]:
        module.compile(dynamic=False if comm.get_world_size() > 1 else None)
