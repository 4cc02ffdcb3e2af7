"""The meta-architecture of point-level region contrast."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import mean_over_ranks
from region_pretrain.modeling.init import zero_init_residual
from region_pretrain.modeling.losses import embedding_std, info_nce
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.region_head import add_head, as_module
from region_pretrain.modeling.shuffle import ShufflingBatchNorm
from region_pretrain.modeling.trunk import prepare_map, read_map
from region_pretrain.projects.point_region_contrast.affinity_head import AffinityHead
from region_pretrain.projects.point_region_contrast.contrast import PointContrast, Points
from region_pretrain.projects.point_region_contrast.distillation import (
    AffinityDistillation,
    AffinityVectors,
)
from region_pretrain.projects.point_region_contrast.pictures import draw_affinities
from region_pretrain.projects.point_region_contrast.points import bilinear_weights

logger = logging.getLogger(__name__)


@dataclass
class _Maps:
    """The heads' outputs at every location of a view's map, row-major."""

    contrast: Tensor | None  # (B, h * w, D)
    affinity: Tensor | None  # (B, h * w, E), unit vectors
    size: tuple[int, int]  # h, w

    @property
    def image(self) -> Tensor:
        """``(B, D)`` unit vectors of the images."""
        return F.normalize(self.contrast.mean(dim=1), dim=1)


@META_ARCH_REGISTRY.register()
class PointRegionContrast(PretrainingModel):
    """MoCo v2 on images, contrast of points in regions, and distillation of points' affinities.

    The detector's trunk is trained up to the map that points are read from, or its feature pyramid
    up to one of its levels.

    Args:
        backbone: the detector's backbone, or its :class:`~region_pretrain.modeling.trunk.Trunk`.
        feature: name of the map that points are read from.
        res5: the last stage of a C4 detector, or its blocks, applied to the map.
        head: from the map's channels to D, at every location.
        affinity_head: the same for affinities.
        queue: keys of other images, D channels.
        contrast: the contrast of points.
        distillation: the distillation of affinities.
        momentum: schedule of the EMA momentum over the run, a function of its progress in [0, 1].
        temperature: temperature of the image loss.
        image_weight, point_weight, affinity_weight: weights of the losses; 0 switches one off.
            Without affinities their head and the third view are not used either.
        zero_init: initialise the scale of the last norm in each residual block with 0.
        shuffle: use batch norm over groups of images in the backbone, with the key network's images
            shuffled over the groups of all processes. False keeps the detector's own norms, which
            should be SyncBN.
        norm_batch_size: images of such a group, at most; None: all of a process. 32 are those of a
            GPU in the released recipes.
        seed: seed of the shuffling.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: a value is out of range, or the backbone has no such map.
    """

    detector_modules: tuple[str, ...] = ("backbone",)

    def __init__(
        self,
        *,
        backbone: nn.Module,
        feature: str,
        res5: nn.Module | Sequence[nn.Module] | None = None,
        head: nn.Module,
        affinity_head: AffinityHead,
        queue: KeyQueue,
        contrast: PointContrast,
        distillation: AffinityDistillation,
        momentum: ParamScheduler,
        temperature: float = 0.2,
        image_weight: float = 0.7,
        point_weight: float = 0.3,
        affinity_weight: float = 0.3,
        zero_init: bool = True,
        shuffle: bool = True,
        norm_batch_size: int | None = 32,
        seed: int | None = 0,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"model.temperature={temperature} must be positive")
        self.weights = {"image": image_weight, "point": point_weight, "affinity": affinity_weight}
        for name, weight in self.weights.items():
            if weight < 0:
                raise UserError(f"model.{name}_weight={weight} must be at least 0")
        if not image_weight and not point_weight:
            raise UserError("one of model.image_weight and model.point_weight must be positive")
        if res5 is not None:
            res5 = as_module(res5)
        if zero_init:
            for module in filter(None, (backbone, res5)):
                zero_init_residual(module)
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.feature = feature
        self.shuffling = ShufflingBatchNorm(shuffle, seed, norm_batch_size)
        self.backbone = self.shuffling.prepare(backbone)
        prepare_map(self.backbone, feature)
        if res5 is not None:
            add_head(self, "roi_heads.res5", self.shuffling.prepare(res5))
            self.detector_modules = ("backbone", "roi_heads")
        self.head = head
        self.affinity_head = affinity_head if affinity_weight else None
        self.contrast = contrast
        self.distillation = distillation if affinity_weight else None
        self.key = MomentumCopy(self.query)
        self.queue = queue
        self.momentum = momentum
        self.temperature = temperature
        self.iteration, self.progress = 0, 0.0
        self._pending_momentum: float | None = None
        # The key network's parameters before the step's update, for its further micro-batches. They
        # are kept if the previous step had several, and in the first step, where this is unknown.
        self._before_update: list[Tensor] = []
        self._accumulates = True
        self._warned = False

    @property
    def query(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        modules = {"backbone": self.backbone, "head": self.head}
        if len(self.detector_modules) > 1:
            modules["res5"] = self.roi_heads.res5
        if self.affinity_head is not None:
            modules["affinity_head"] = self.affinity_head
        return modules

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Record the progress and the momentum of the step's update.

        The key network is updated in the forward pass: it embeds the query view's partner before
        the update, and the key view after it.
        """
        self.iteration, self.progress = iteration, iteration / max_iter
        self._pending_momentum, self._before_update = self.momentum(self.progress), []

    def after_step(self, iteration: int, max_iter: int) -> None:
        """Move the center of the teacher's similarities to prototypes."""
        if self.distillation is not None:
            self.distillation.move_center()

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            batch: from :class:`~region_pretrain.projects.point_region_contrast.PointRegionViews`.

        Returns:
            ``loss_image``, ``loss_point`` and ``loss_affinity``, weighted, unless switched off;
            ``embedding_std``; the mean cosine of points of the same region; the numbers of
            contrasted points and of shared places per image; the teacher's temperature.
        """
        query_view, key_view = batch.views[:2]
        query = self._embed(self.query, query_view)
        with torch.no_grad():
            teacher = None if self.distillation is None else self._teacher(batch)
            self._update_key_network()
            key = self._keys(key_view)

        outputs = {}
        if self.weights["image"]:
            losses = info_nce(query.image, key.image, self.queue.negatives(), self.temperature)
            outputs["loss_image"] = self.weights["image"] * losses.mean()
            outputs["embedding_std"] = embedding_std(key.image)
            if self.training:
                self.queue.enqueue(key.image)
        if self.weights["point"]:
            slots = key_view.boxes.shape[1]
            points = [
                self._points(view, maps, slots)
                for view, maps in ((query_view, query), (key_view, key))
            ]
            total, count, similarity = self.contrast(*points)
            if self.training and not self._warned and not _have_common_regions(*points):
                self._warned = True
                logger.warning(
                    "no image of this batch has a region in both views. If this persists, only "
                    "images are contrasted"
                )
            outputs["loss_point"] = self.weights["point"] * mean_over_ranks(total, count)
            outputs["points/similarity"] = similarity
            outputs["points/per_image"] = count / len(batch)
        if self.distillation is not None:
            total, count = self._distil(batch, query, teacher, key)
            outputs["loss_affinity"] = self.weights["affinity"] * mean_over_ranks(total, count)
            outputs["places/per_image"] = torch.tensor(count / len(batch))
            temperature = self.distillation.temperature_at(self.progress)
            outputs["places/teacher_temperature"] = torch.tensor(temperature)
        return outputs

    @torch.no_grad()
    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]]:
        """Draw the affinities of a point of the query view with the places of the key view.

        Args:
            batch: from :class:`~region_pretrain.projects.point_region_contrast.PointRegionViews`.

        Returns:
            For each image the query view with a point, and the key view coloured by the point's
            affinities according to student and teacher: (H, W, 3) uint8 RGB.

        Raises:
            UserError: affinities are switched off.
        """
        if self.distillation is None:
            raise UserError("model.affinity_weight=0 leaves no affinities to draw")
        partner_view, (query_view, key_view) = self._partner(batch), batch.views[:2]
        query = self._embed(self.query, query_view)
        partner, key = (self._embed(self.key, view) for view in (partner_view, key_view))
        affinities = self.distillation.affinities(
            AffinityVectors(query.affinity, None),
            AffinityVectors(partner.affinity, None),
            key.affinity,
            self._places(batch, query.size),
            query.size,
        )
        places = self._place_points(batch)[0]
        return draw_affinities(query_view, key_view, places, partner_view.valid, *affinities)

    def _partner(self, batch: ViewBatch) -> View:
        if len(batch.views) < 3:
            raise UserError(
                "dataloader.train.dataset.views.pairs=0 leaves nothing to distil: make it positive "
                "or set model.affinity_weight=0"
            )
        return batch.views[2]

    def _teacher(self, batch: ViewBatch) -> AffinityVectors:
        """The key network on the query view's partner, as it was before the step's update."""
        self._exchange_key_network()
        vectors = self._keys(self._partner(batch), affinity_only=True).affinity
        teacher = AffinityVectors(vectors, self.key["affinity_head"].directions())
        self._exchange_key_network()
        return teacher

    def _exchange_key_network(self) -> None:
        """Exchange the key network's parameters with those before the step's update, if kept."""
        if self._before_update:
            current = [p.data for p in self.key.parameters()]
            for parameter, before in zip(self.key.parameters(), self._before_update, strict=True):
                parameter.data = before
            self._before_update = current

    def _update_key_network(self) -> None:
        """Once per step, however many micro-batches it has."""
        if self._pending_momentum is None:
            self._accumulates = True
            return
        if self._accumulates and self.distillation is not None:
            self._before_update = [p.clone() for p in self.key.parameters()]
        self._accumulates = False
        self.key.ema_update(self._pending_momentum)
        self._pending_momentum = None

    def _distil(
        self, batch: ViewBatch, query: _Maps, teacher: AffinityVectors, key: _Maps
    ) -> tuple[Tensor, int]:
        return self.distillation(
            AffinityVectors(query.affinity, self.affinity_head.directions()),
            teacher,
            key.affinity,
            self._places(batch, query.size),
            self._partner(batch).valid,
            query.size,
            self.progress,
        )

    def _place_points(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """The places that query view and partner share, ``(B, M, 2)`` in each, on the CPU."""
        query, key, partner = batch.views
        return query.boxes[:, key.boxes.shape[1] :, :2], partner.boxes[..., :2]

    def _places(self, batch: ViewBatch, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The shared places' weights in both maps, ``(B, M, h * w)``."""
        views = (batch.views[0], batch.views[2])
        both = zip(self._place_points(batch), views, strict=True)
        return tuple(self._weights(xy, view, size) for xy, view in both)

    def _points(self, view: View, maps: _Maps, slots: int) -> Points:
        """The points of regions, which are the view's first slots."""
        weights = self._weights(view.boxes[:, :slots, :2], view, maps.size)
        with torch.autocast(weights.device.type, enabled=False):
            vectors = weights @ maps.contrast
        return Points(vectors, view.region_ids[:, :slots], view.valid[:, :slots])

    def _weights(self, xy: Tensor, view: View, size: tuple[int, int]) -> Tensor:
        xy = to_device(xy, self.preprocess.pixel_mean.device)
        return bilinear_weights(xy, tuple(view.images.shape[-2:]), size)

    def _keys(self, view: View, affinity_only: bool = False) -> _Maps:
        """The key network on a view, with shuffled images."""
        key = self.iteration, int(affinity_only)
        permutation = self.shuffling.permutation(len(view.images), *key)
        maps = self._embed(self.key, permutation.shuffle_view(view), affinity_only)
        contrast, affinity = (
            None if rows is None else permutation.unshuffle(rows)
            for rows in (maps.contrast, maps.affinity)
        )
        return _Maps(contrast, affinity, maps.size)

    def _embed(
        self, network: Mapping[str, nn.Module], view: View, affinity_only: bool = False
    ) -> _Maps:
        images = self.preprocess(view)
        features = read_map(network, images, self.feature)
        size = tuple(features.shape[-2:])
        rows = features.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * h * w, C)
        shape = (len(images), size[0] * size[1], -1)
        contrast = affinity = None
        if not affinity_only:
            contrast = network["head"](rows).float().view(shape)
        if "affinity_head" in network:
            affinity = network["affinity_head"](rows).view(shape)
        return _Maps(contrast, affinity, size)


def _have_common_regions(query: Points, key: Points) -> bool:
    """Whether any image has a valid point of one region in both views; on the CPU."""
    images = zip(query.ids, query.valid, key.ids, key.valid, strict=True)
    return any(torch.isin(ids[valid], others[found]).any() for ids, valid, others, found in images)
