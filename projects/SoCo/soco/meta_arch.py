"""SoCo's meta-architecture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.device import to_device
from region_pretrain.modeling.init import zero_init_residual
from region_pretrain.modeling.losses import embedding_std, matched_cosine_loss, matches
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps
from region_pretrain.modeling.region_head import add_head, as_module
from region_pretrain.modeling.regions import UNASSIGNED, assign_levels, check_levels, pool_regions
from region_pretrain.projects.soco.views import pair_groups


@META_ARCH_REGISTRY.register()
class SoCo(PretrainingModel):
    """BYOL on regions, through all of a detector before its predictors.

    The online network is trained to predict a region's embedding, computed by the target network in
    another view with a different crop and scale. Backbone, pooler and box head are the detector's
    own modules and keep their names, so a checkpoint loads into the detector.

    Args:
        backbone: the detector's backbone.
        in_features: names of the backbone's maps that are pooled, in the pooler's order.
        pooler: the detector's box pooler.
        head: the detector's head for pooled regions, or its blocks. If it returns maps (res5 of a
            C4 detector, towers of a one-stage detector), they are averaged over space.
        head_name: name of the head in the detector, e.g. ``roi_heads.box_head``.
        projector, predictor: :class:`~region_pretrain.modeling.heads.MLPHead`.
        momentum: schedule of the EMA momentum over the run, from 0 to 1.
        level_scales: largest region scale of each level in view pixels
            (:func:`~region_pretrain.modeling.regions.assign_levels`); unused with a single level.
        sources: the view sampler's ``sources``, which determine the pairs of views.
        all_levels: embed each region on every level and keep the assigned one, as released: 4 times
            the head's work, and batch-norm statistics over all levels. ``False`` embeds each region
            on its assigned level only.
        zero_init: zero the scale of the last norm of each residual block in backbone and head.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: ``in_features``, ``pooler`` and ``level_scales`` do not fit each other.
    """

    detector_modules: tuple[str, ...] = ("backbone", "roi_heads")

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        pooler: ROIPooler,
        head: nn.Module | Sequence[nn.Module],
        head_name: str = "roi_heads.box_head",
        projector: nn.Module,
        predictor: nn.Module,
        momentum: ParamScheduler,
        level_scales: Sequence[float] = (48, 96, 192, 224),
        sources: Sequence[str | int],
        all_levels: bool = False,
        zero_init: bool = True,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        head = as_module(head)
        check_levels(backbone, in_features, pooler, level_scales)
        if zero_init:
            zero_init_residual(backbone)
            zero_init_residual(head)  # res5 of a C4 detector; a box head has no such blocks
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.backbone = backbone
        add_head(self, "roi_heads.box_pooler", pooler)
        add_head(self, head_name, head)
        self.head_name = head_name
        self.detector_modules = ("backbone", head_name.partition(".")[0])
        freeze_unread(backbone, in_features)
        self.projector = projector
        self.predictor = predictor
        self.target = MomentumCopy(self.online)
        self.momentum = momentum
        self.in_features = list(in_features)
        self.level_scales = list(level_scales)
        self.groups = pair_groups(list(sources))
        self.all_levels = all_levels

    @property
    def online(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        head = self.get_submodule(self.head_name)
        return {"backbone": self.backbone, "head": head, "projector": self.projector}

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Update the target network."""
        momentum = self.momentum(iteration / max_iter)
        self.target.ema_update(momentum)
        get_event_storage().put_scalar("target_momentum", momentum, smoothing_hint=False)

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Compute the losses of a batch from :class:`~region_pretrain.projects.soco.SoCoViews`.

        Returns:
            The symmetric ``loss_view{j}``, in [-4, 4], for each pair (first view, view j); and
            ``embedding_std``.
        """
        levels = [self._levels(view) for view in batch.views]
        images = self.preprocess.together(batch.views)
        inputs = list(zip(images, batch.views, levels, strict=True))
        online = [self._embed(self.online, *x, predictor=self.predictor) for x in inputs]
        with torch.no_grad():
            target = [self._embed(self.target, *x) for x in inputs]

        first, slots = batch.views[0], batch.views[1].boxes.shape[1]
        valid = [
            view.valid & (level != UNASSIGNED)
            for view, level in zip(batch.views, levels, strict=True)
        ]
        outputs: dict[str, Tensor] = {}
        for j, group in enumerate(self.groups, start=1):
            own = slice(group * slots, (group + 1) * slots)
            match = matches(
                first.region_ids[:, own], batch.views[j].region_ids, valid[0][:, own], valid[j]
            )
            match = to_device(match, online[0].device)
            outputs[f"loss_view{j + 1}"] = matched_cosine_loss(
                online[0][:, own], target[j], match
            ) + matched_cosine_loss(online[j], target[0][:, own], match.transpose(1, 2))
        outputs["embedding_std"] = embedding_std(target[0])
        return outputs

    def _levels(self, view: View) -> Tensor:
        """``(B, K)`` level of each region, on the CPU."""
        if len(self.in_features) == 1:
            return torch.zeros_like(view.region_ids)
        levels = assign_levels(view.boxes, self.level_scales)
        if (view.valid & (levels == UNASSIGNED)).any():
            log_first_n(
                logging.WARNING,
                f"regions above {self.level_scales[-1]:g} pixels are left out: "
                f"model.level_scales={self.level_scales} should end at the size of the views, "
                f"{max(view.images.shape[-2:])}",
            )
        return levels

    def _embed(
        self,
        network: Mapping[str, nn.Module],
        images: Tensor,
        view: View,
        levels: Tensor,
        predictor: nn.Module | None = None,
    ) -> Tensor:
        """``(B, K, D)`` unit vectors of a view's regions."""
        reads = dict.fromkeys(self.in_features, slice(0, len(images)))
        maps = pyramid_maps(network["backbone"], images, reads)
        features = [maps[name] for name in self.in_features]
        size = tuple(images.shape[-2:])

        def embed_on(levels: Tensor | int) -> Tensor:
            x = pool_regions(features, view.boxes, levels, self.roi_heads.box_pooler, size)
            x = network["head"](x)
            x = network["projector"](x.mean(dim=(2, 3)) if x.dim() == 4 else x)
            return predictor(x) if predictor is not None else x

        if self.all_levels:
            everywhere = torch.stack([embed_on(i) for i in range(len(features))])  # (L, B * K, D)
            chosen = to_device(levels.clamp(min=0), images.device).reshape(1, -1, 1)
            chosen = chosen.expand(1, -1, everywhere.shape[-1])
            embedded = everywhere.gather(0, chosen)[0]
        else:
            embedded = embed_on(levels)
        return F.normalize(embedded.float(), dim=1).view(*levels.shape, -1)
