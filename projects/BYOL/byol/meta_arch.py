"""BYOL's meta-architecture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import ViewBatch
from region_pretrain.modeling.losses import embedding_std, matched_cosine_loss
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.trunk import Trunk


@META_ARCH_REGISTRY.register()
class BYOL(PretrainingModel):
    """Image-level learning without negatives, the baseline of SoCo.

    The online network is trained to predict the embedding that the target network, its moving
    average, computes for the other of two crops.

    Args:
        backbone: the detector's trunk.
        projector, predictor: :class:`~region_pretrain.modeling.heads.MLPHead`.
        momentum: schedule of the EMA momentum over the run, from 0 to 1.
        pixel_mean, pixel_std, input_format: the detector's.
    """

    detector_modules = ("backbone",)

    def __init__(
        self,
        *,
        backbone: Trunk,
        projector: nn.Module,
        predictor: nn.Module,
        momentum: ParamScheduler,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str,
    ) -> None:
        super().__init__()
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor
        self.target = MomentumCopy(self.online)
        self.momentum = momentum

    @property
    def online(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        return {"backbone": self.backbone, "projector": self.projector}

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
        images = [self.preprocess(view) for view in batch.views]
        first, second = (_unit(self.predictor(self.projector(self.backbone(x)))) for x in images)
        target = self.target
        with torch.no_grad():
            of_first, of_second = (
                _unit(target["projector"](target["backbone"](x))) for x in images
            )
        match = torch.ones(len(batch), 1, 1, dtype=torch.bool, device=first.device)
        loss = matched_cosine_loss(first, of_second, match)
        loss = loss + matched_cosine_loss(second, of_first, match)
        return {"loss_image": loss, "embedding_std": embedding_std(of_first)}


def _unit(vectors: Tensor) -> Tensor:
    """``(B, D)`` to ``(B, 1, D)`` unit vectors: the image is its only region."""
    return F.normalize(vectors.float(), dim=1)[:, None]
