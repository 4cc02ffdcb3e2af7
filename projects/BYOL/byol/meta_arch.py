"""BYOL's meta-architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import ViewBatch
from region_pretrain.modeling.init import zero_init_residual
from region_pretrain.modeling.losses import embedding_std, matched_cosine_loss
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.region_head import add_head, as_module
from region_pretrain.modeling.trunk import prepare_map, read_map


@META_ARCH_REGISTRY.register()
class BYOL(PretrainingModel):
    """Image-level learning without negatives, the baseline of SoCo.

    The online network is trained to predict the embedding that the target network, its moving
    average, computes for the other of two crops.

    Args:
        backbone: the detector's backbone, or its :class:`~region_pretrain.modeling.trunk.Trunk`.
        feature: name of the map that is averaged over space.
        res5: the last stage of a C4 detector, or its blocks, applied to the map.
        projector, predictor: :class:`~region_pretrain.modeling.heads.MLPHead`.
        momentum: schedule of the EMA momentum over the run, from 0 to 1.
        zero_init: initialise the scale of the last norm in each residual block with 0.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: the backbone has no such map.
    """

    detector_modules: tuple[str, ...] = ("backbone",)

    def __init__(
        self,
        *,
        backbone: nn.Module,
        feature: str,
        res5: nn.Module | Sequence[nn.Module] | None = None,
        projector: nn.Module,
        predictor: nn.Module,
        momentum: ParamScheduler,
        zero_init: bool = True,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.backbone = backbone
        self.feature = feature
        prepare_map(backbone, feature)
        if res5 is not None:
            add_head(self, "roi_heads.res5", as_module(res5))
            self.detector_modules = ("backbone", "roi_heads")
        if zero_init:
            zero_init_residual(self)
        self.projector = projector
        self.predictor = predictor
        self.target = MomentumCopy(self.online)
        self.momentum = momentum

    @property
    def online(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        modules = {"backbone": self.backbone, "projector": self.projector}
        if len(self.detector_modules) > 1:
            modules["res5"] = self.roi_heads.res5
        return modules

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Update the target network."""
        momentum = self.momentum(iteration / max_iter)
        self.target.ema_update(momentum)
        get_event_storage().put_scalar("target_momentum", momentum, smoothing_hint=False)

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Compute the symmetric loss of a pair of views.

        Args:
            batch: from :class:`~region_pretrain.data.two_crops.TwoCrops`.

        Returns:
            ``loss_image``, in [-4, 4]: the paper's squared error (equation 2, both orders) minus 4;
            and ``embedding_std``.
        """
        images = self.preprocess.together(batch.views)
        first, second = (_unit(self.predictor(self._project(self.online, x))) for x in images)
        with torch.no_grad():
            of_first, of_second = (_unit(self._project(self.target, x)) for x in images)
        match = torch.ones(len(batch), 1, 1, dtype=torch.bool, device=first.device)
        loss = matched_cosine_loss(first, of_second, match)
        loss = loss + matched_cosine_loss(second, of_first, match)
        return {"loss_image": loss, "embedding_std": embedding_std(of_first)}

    def _project(self, network: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        return network["projector"](read_map(network, images, self.feature).mean(dim=(2, 3)))


def _unit(vectors: Tensor) -> Tensor:
    """``(B, D)`` to ``(B, 1, D)`` unit vectors: the image is its only region."""
    return F.normalize(vectors.float(), dim=1)[:, None]
