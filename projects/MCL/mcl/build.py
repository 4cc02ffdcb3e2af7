"""MCL around a detector."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from omegaconf import DictConfig
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector, RegionHead
from region_pretrain.modeling.given import given_part
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.region_head import SharedHeads
from region_pretrain.projects.mcl.meta_arch import MCL
from region_pretrain.projects.mcl.montage import Montage
from region_pretrain.projects.mcl.pseudo_levels import PseudoLevels
from region_pretrain.projects.mcl.supervised import SupervisedMCL
from region_pretrain.solver import cosine_momentum

#: Ratio of a level's tiles -> images per canvas (montages of 224 pixels).
IMAGES_PER_CANVAS = {1: 1, 2: 4, 4: 16, 8: 32}


def mcl(
    detector: DictConfig | CfgNode | nn.Module,
    *,
    trunk_only: bool = False,
    fc: bool | None = None,
    hidden_dim: int = 2048,
    dim: int = 256,
    ratios: Sequence[int] | None = None,
) -> DictConfig | MCL:
    """MCL on the feature pyramid and the head of a detector.

    Args:
        detector: see :class:`~region_pretrain.modeling.detector.Detector`.
        trunk_only: compute the levels from the trunk's last map instead: only the trunk is
            pre-trained.
        fc: train the fc layers of the box head as well, so that the complete head transfers;
            False averages the maps of its convolutions. None: only if it has no convolutions.
        hidden_dim, dim: hidden and output channels of projector and predictors.
        ratios: the montage's; None for those of :func:`tile_ratios`.

    Returns:
        The lazy ``model`` of a pre-training config; for a built detector a model that shares its
        modules.

    Raises:
        UserError: the detector has no feature pyramid or no head.
    """
    parts, head = _parts(detector, fc)
    model = L(MCL)(
        **_tiles(parts, head, trunk_only, ratios),
        projector=L(MLPHead)(
            input_dim=head.channels, hidden_dim=hidden_dim, output_dim=dim, final_norm=True
        ),
        predictor=L(MLPHead)(input_dim=dim, hidden_dim=hidden_dim, output_dim=dim),
        momentum=L(cosine_momentum)(start=0.99),
        temperature=1.0,
        pairing="top",
    )
    return parts.finish(model)


def supervised_mcl(
    detector: DictConfig | CfgNode | nn.Module,
    num_classes: int,
    *,
    fc: bool | None = None,
    ratios: Sequence[int] | None = None,
) -> DictConfig | SupervisedMCL:
    """Classify tiles into their image's class, on the same modules as :func:`mcl`.

    Args:
        detector, fc, ratios: as for :func:`mcl`.
        num_classes: number of classes of the labelled images.
    """
    parts, head = _parts(detector, fc)
    classifier = L(nn.Linear)(in_features=head.channels, out_features=num_classes)
    return parts.finish(
        L(SupervisedMCL)(**_tiles(parts, head, False, ratios), classifier=classifier)
    )


def tile_ratios(detector: DictConfig | CfgNode | nn.Module, size: int = 224) -> list[int]:
    """The ratios of tiles for which a detector has a map, e.g. 1, 2, 4 and 8 for P5 to P2.

    Args:
        detector: as for :func:`mcl`.
        size: side length of a canvas in pixels.
    """
    return _ratios(Detector(detector), size)


def _ratios(parts: Detector, size: int = 224) -> list[int]:
    window = parts.pooled_shape[1]
    return [ratio for ratio in IMAGES_PER_CANVAS if size / ratio / window in parts.strides]


def _parts(detector: Any, fc: bool | None) -> tuple[Detector, RegionHead]:
    parts = Detector(detector)
    head = parts.head
    if not parts.levels or head is None:
        raise UserError(
            "the detector lacks a feature pyramid or a head for regions, and MCL trains both: use "
            "soco, point_region, moco or byol"
        )
    if not fc:
        convolutions = _without_fc(head.part)
        if convolutions is not None:
            head = RegionHead(convolutions, head.name, parts.channels(convolutions))
        elif fc is False:
            raise UserError("fc=False: the box head has no convolutions, only fc layers")
    return parts, head


def _without_fc(head: Any) -> Any:
    """A box head's convolutions; None if it has none or is of another kind."""
    if isinstance(head, SharedHeads):
        first = _without_fc(head[0])
        return None if first is None else SharedHeads(first, len(head))
    if isinstance(head, nn.Module):
        return convolutions_of(head)
    if head.get("_target_") is SharedHeads or "count" in head:
        first = _without_fc(head.head)
        return None if first is None else L(SharedHeads)(head=first, count=head.count)
    if head.get("_target_") is given_part:
        return L(convolutions_of)(head=head) if convolutions_of(instantiate(head)) else None
    if not head.get("conv_dims") or "fc_dims" not in head:
        return None
    head = copy.deepcopy(head)
    head.fc_dims = []
    return head


def convolutions_of(head: nn.Module) -> nn.Sequential | None:
    """The convolutions of Detectron2's box head; None if it has none or is of another kind."""
    named = [(n, m) for n, m in head.named_children() if n.startswith("conv")]
    if not named or not isinstance(head, FastRCNNConvFCHead):
        return None
    return nn.Sequential(OrderedDict(named))


def _tiles(
    parts: Detector, head: RegionHead, trunk_only: bool, ratios: Sequence[int] | None
) -> dict[str, Any]:
    """The arguments of a :class:`~region_pretrain.projects.mcl.tiles.TileModel`."""
    ratios = list(ratios or _ratios(parts))
    montage = Montage(224, ratios, [IMAGES_PER_CANVAS[r] for r in ratios]) if parts.is_built else 0
    # Half of the weight on the coarsest level, half of the rest on the next one, and so on.
    weights = [2.0 ** -(i + 1) for i in range(len(ratios) - 1)]
    weights.append(1 - sum(weights))
    networks = {"backbone": parts.backbone}
    if trunk_only:
        feature, channels = parts.trunk_map
        stride = parts.trunk_stride
        if stride != 32:
            raise UserError(
                f"trunk_only=True computes P5 from a map of stride 32, and {feature} has {stride}: "
                "use the detector's pyramid"
            )
        neck = L(PseudoLevels)(
            in_channels=channels, out_channels=parts.pooled_shape[0], in_feature=feature
        )
        networks = {"backbone": parts.trunk, "neck": neck}
    return dict(
        **networks,
        pooler=parts.pooler,
        head=head.part,
        head_name=head.name,
        montage=parts.refer("dataloader.train.dataset.views.montage", montage),
        # "all": the released code's batch-norm statistics, several times the work.
        compute="windows",
        level_weights=weights,
        **parts.pixels,
    )
