"""Point-level region contrast around a detector."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.projects.point_region_contrast.affinity_head import AffinityHead
from region_pretrain.projects.point_region_contrast.contrast import PointContrast
from region_pretrain.projects.point_region_contrast.distillation import AffinityDistillation
from region_pretrain.projects.point_region_contrast.meta_arch import PointRegionContrast

#: ``level`` for the coarsest map of the trunk, followed by res5 in a C4 detector.
TRUNK = "trunk"


def point_region(
    detector: DictConfig | CfgNode | nn.Module,
    *,
    level: str | None = None,
    hidden_dim: int = 2048,
    dim: int = 128,
    cells: int = 56,
) -> DictConfig | PointRegionContrast:
    """Point-level region contrast on one map of a detector.

    Args:
        detector: see :class:`~region_pretrain.modeling.detector.Detector`.
        level: a map of the feature pyramid, which is pre-trained down to that level, or
            ``"trunk"``: only the trunk is pre-trained, with ``res5`` of a C4 detector. None for
            the pyramid's map with stride 16, or the trunk if there is no such map.
        hidden_dim: hidden channels of both heads.
        dim: dimension of a point's embedding; its affinity vector is twice as long.
        cells: cells per side of the view; only used for a built detector.

    Returns:
        The lazy ``model`` of a pre-training config; for a built detector a model that shares its
        modules.

    Raises:
        UserError: the detector's pyramid has no such level.
    """
    parts = Detector(detector)
    if level is None:
        level = next((name for name, s in parts.levels.items() if s.stride == 16), TRUNK)
    if level == TRUNK:
        networks, channels = parts.image_networks()
    elif level in parts.levels:
        networks = {"backbone": parts.backbone, "feature": level}
        channels = parts.levels[level].channels
    else:
        raise UserError(f"level={level} must be one of {', '.join([*parts.levels, TRUNK])}")
    return parts.finish(
        L(PointRegionContrast)(
            **networks,
            head=L(MLPHead)(input_dim=channels, hidden_dim=hidden_dim, output_dim=dim, norm=""),
            affinity_head=L(AffinityHead)(
                input_dim=channels,
                hidden_dim=hidden_dim,
                output_dim=2 * dim,
                norm="SyncBN",
                prototypes=0,
            ),
            queue=L(KeyQueue)(length=65_536, dim=dim),
            contrast=L(PointContrast)(
                temperature=0.2,
                in_image=True,
                others="local",
                pool=1,
                log="outside",
                same_view=False,
                # The queue's keys for others="queue".
                queue_length=65_536,
                dim=dim,
            ),
            distillation=L(AffinityDistillation)(
                cells=parts.refer("dataloader.train.dataset.views.cells", cells),
                student_temperature=0.1,
                teacher_temperature=(0.04, 0.07),
                warmup=0.3,
                prototypes=parts.refer("model.affinity_head.prototypes", 0),
                center_momentum=0.9,
            ),
            momentum=L(ConstantParamScheduler)(value=0.999),
            temperature=0.2,
            image_weight=0.7,
            point_weight=0.3,
            affinity_weight=0.3,
            zero_init=True,
            # True: shuffling BN, i.e. batch norm over norm_batch_size images (null: of a process).
            # False: the detector's SyncBN.
            shuffle=True,
            norm_batch_size=32,
            seed=parts.refer("train.seed", 0),
            **parts.pixels,
        )
    )
