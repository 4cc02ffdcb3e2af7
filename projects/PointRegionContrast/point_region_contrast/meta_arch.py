"""The meta-architecture of point-level region contrast."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import mean_over_ranks
from region_pretrain.modeling.init import zero_init_residual
from region_pretrain.modeling.losses import embedding_std, info_nce
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.norms import use_local_batchnorm
from region_pretrain.modeling.points import bilinear_weights
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.shuffle import ImageShuffle
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.point_region_contrast.contrast import PointContrast, Points
from region_pretrain.projects.point_region_contrast.distillation import (
    AffinityDistillation,
    AffinityHead,
    Described,
)
from region_pretrain.projects.point_region_contrast.pictures import draw_affinities

logger = logging.getLogger(__name__)


@dataclass
class _Maps:
    """What the heads say of every place of a view's map, row by row."""

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

    What is trained is the detector's trunk, up to the map that points are looked up in, or its FPN
    up to one of its levels.

    Args:
        backbone: the detector's :class:`~region_pretrain.modeling.trunk.Trunk`, its FPN, or the
            backbone of a C4 detector.
        feature: name of the backbone's map; with a :class:`Trunk` its own.
        res5: of a C4 detector: the stage behind that map, run on all of it.
        head: from the map's channels to D, at every place.
        affinity_head: the same for affinities.
        queue: keys of other images, D channels.
        contrast: of points.
        distillation: of affinities.
        momentum: schedule of the EMA momentum over the run, from 0 to 1.
        temperature: of the image loss.
        image_weight, point_weight, affinity_weight: of the losses. 0 switches one off; without the
            affinities their head and the third view go, too.
        zero_init: the scale of the last norm of each residual block starts at 0.
        shuffle: batch norm in the backbone per process, as released, and images of the key network
            dealt to other processes. ``False``: the detector's own norms, which should be SyncBN.
        seed: of the shuffle.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: a value that makes no sense.
    """

    detector_modules: tuple[str, ...] = ("backbone",)

    def __init__(
        self,
        *,
        backbone: Trunk | Backbone,
        feature: str = "res5",
        res5: nn.Module | None = None,
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
        seed: int | None = 0,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"model.temperature={temperature}: it is more than 0")
        self.weights = {"image": image_weight, "point": point_weight, "affinity": affinity_weight}
        for name, weight in self.weights.items():
            if weight < 0:
                raise UserError(f"model.{name}_weight={weight}: at least 0")
        if not image_weight and not point_weight:
            raise UserError("model.image_weight=0 and point_weight=0: one of them is more than 0")
        if not isinstance(backbone, Trunk) and feature not in backbone.output_shape():
            known = ", ".join(backbone.output_shape())
            raise UserError(f"model.feature={feature}: the backbone gives {known}")
        if zero_init:
            for module in filter(None, (backbone, res5)):
                zero_init_residual(module)
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.feature = feature
        self.backbone = use_local_batchnorm(backbone) if shuffle else backbone
        self.roi_heads = nn.Module()
        if res5 is not None:
            self.roi_heads.add_module("res5", use_local_batchnorm(res5) if shuffle else res5)
            self.detector_modules = ("backbone", "roi_heads")
        if frozen := freeze_unread(backbone, [feature]):
            logger.info("%s is all that is looked at: %s keep their weights", feature, frozen)
        self.head = head
        self.affinity_head = affinity_head if affinity_weight else None
        self.contrast = contrast
        self.distillation = distillation if affinity_weight else None
        self.key = MomentumCopy(self.query)
        self.queue = queue
        self.momentum = momentum
        self.temperature = temperature
        self.shuffle = shuffle
        self.seed = seed or 0
        self.iteration, self.done = 0, 0.0
        self._pending_momentum: float | None = None
        self._warned = False

    @property
    def query(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        modules = {"backbone": self.backbone, "head": self.head}
        if hasattr(self.roi_heads, "res5"):
            modules["res5"] = self.roi_heads.res5
        if self.affinity_head is not None:
            modules["affinity_head"] = self.affinity_head
        return modules

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Take note of where the training is; the engine calls it before each step's forward.

        The key network moves in the forward pass: it sees the partner of the query view before it
        moves, and the key view after.
        """
        self.iteration, self.done = iteration, iteration / max_iter
        self._pending_momentum = self.momentum(self.done)

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Losses of a batch from :class:`~region_pretrain.projects.point_region_contrast.views`.

        Returns:
            ``loss_image``, ``loss_point`` and ``loss_affinity``, weighted, those that are not
            switched off; ``embedding_std``; the mean cosine of points of the same region; how many
            points an image has that are contrasted, and how many places; the teacher's temperature.
        """
        query_view, key_view = batch.views[:2]
        query = self._describe(self.query, query_view)
        with torch.no_grad():
            partner = None
            if self.distillation is not None:
                partner = self._keys(self._partner(batch), affinity_only=True)
            self._move_key_network()
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
            if not count and self.training and not self._warned:
                self._warned = True
                logger.warning(
                    "no image of a batch has a region that both views see; if this goes on, only "
                    "images are contrasted (views.maps.kind=boxes needs dataset.regions)"
                )
            outputs["loss_point"] = self.weights["point"] * mean_over_ranks(total, count)
            outputs["points/similarity"] = similarity
            outputs["points/an_image"] = torch.tensor(count / len(batch))
        if self.distillation is not None:
            total, count = self._distil(batch, query, partner, key)
            outputs["loss_affinity"] = self.weights["affinity"] * mean_over_ranks(total, count)
            outputs["places/an_image"] = torch.tensor(count / len(batch))
            temperature = self.distillation.temperature_at(self.done)
            outputs["places/teacher_temperature"] = torch.tensor(temperature)
        return outputs

    @torch.no_grad()
    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]]:
        """Draw to which places of the key view a point of the query view is alike.

        Args:
            batch: from :class:`~region_pretrain.projects.point_region_contrast.views`.

        Returns:
            For each image the query view with a point, and the key view coloured by the point's
            affinities, as the student has them and as the teacher does: (H, W, 3) uint8 RGB.

        Raises:
            UserError: the affinities are switched off.
        """
        if self.distillation is None:
            raise UserError("model.affinity_weight=0: there are no affinities to draw")
        partner_view, (query_view, key_view) = self._partner(batch), batch.views[:2]
        query = self._describe(self.query, query_view)
        partner, key = (self._describe(self.key, view) for view in (partner_view, key_view))
        affinities = self.distillation.affinities(
            Described(query.affinity, None),
            Described(partner.affinity, None),
            key.affinity,
            self._places(batch, query.size),
            query.size,
        )
        places = self._place_points(batch)[0]
        return draw_affinities(query_view, key_view, places, partner_view.valid, *affinities)

    def _partner(self, batch: ViewBatch) -> View:
        if len(batch.views) < 3:
            raise UserError(
                "dataloader.train.dataset.views.pairs=0 leaves nothing to distil: set "
                "model.affinity_weight=0 as well, or pairs above 0"
            )
        return batch.views[2]

    def _move_key_network(self) -> None:
        """Once a step, however many micro-batches it has."""
        if self._pending_momentum is not None:
            self.key.ema_update(self._pending_momentum)
            self._pending_momentum = None

    def _distil(
        self, batch: ViewBatch, query: _Maps, partner: _Maps, key: _Maps
    ) -> tuple[Tensor, int]:
        return self.distillation(
            Described(query.affinity, self.affinity_head.directions()),
            Described(partner.affinity, self.key["affinity_head"].directions()),
            key.affinity,
            self._places(batch, query.size),
            self._partner(batch).valid,
            query.size,
            self.done,
        )

    def _place_points(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """``(B, M, 2)`` on the CPU: the places that query view and partner share, in each."""
        query, key, partner = batch.views
        return query.boxes[:, key.boxes.shape[1] :, :2], partner.boxes[..., :2]

    def _places(self, batch: ViewBatch, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Their weights in the maps, ``(B, M, h * w)``."""
        views = (batch.views[0], batch.views[2])
        both = zip(self._place_points(batch), views, strict=True)
        return tuple(self._weights(xy, view, size) for xy, view in both)

    def _points(self, view: View, maps: _Maps, slots: int) -> Points:
        """The points of regions: the view's first slots."""
        weights = self._weights(view.boxes[:, :slots, :2], view, maps.size)
        with torch.autocast(weights.device.type, enabled=False):
            vectors = weights @ maps.contrast
        return Points(vectors, view.region_ids[:, :slots], view.valid[:, :slots])

    def _weights(self, xy: Tensor, view: View, size: tuple[int, int]) -> Tensor:
        xy = xy.to(self.preprocess.pixel_mean.device, non_blocking=True)
        return bilinear_weights(xy, tuple(view.images.shape[-2:]), size)

    def _keys(self, view: View, affinity_only: bool = False) -> _Maps:
        """The key network on a view, its images dealt to other processes where that is asked."""
        if not self.shuffle or comm.get_world_size() == 1:
            return self._describe(self.key, view, affinity_only)
        shuffle = ImageShuffle(len(view.images), (self.seed, self.iteration, int(affinity_only)))
        images, photometry = shuffle.deal(view.images), shuffle.deal(view.photometry)
        dealt = replace(view, images=images, photometry=photometry)
        maps = self._describe(self.key, dealt, affinity_only)
        one = torch.ones(len(images), dtype=torch.int64)
        there = [m for m in (maps.contrast, maps.affinity) if m is not None]
        back = shuffle.collect(torch.cat(there, dim=2), one, one)
        parts = iter(back.split([m.shape[2] for m in there], dim=2))
        contrast, affinity = (
            None if m is None else next(parts) for m in (maps.contrast, maps.affinity)
        )
        return _Maps(contrast, affinity, maps.size)

    def _describe(
        self, network: Mapping[str, nn.Module], view: View, affinity_only: bool = False
    ) -> _Maps:
        images, backbone = self.preprocess(view), network["backbone"]
        if isinstance(backbone, Trunk):
            features = backbone.last_map(images)
        else:
            everything = {self.feature: slice(0, len(images))}
            features = pyramid_maps(backbone, images, everything)[self.feature]
        if "res5" in network:
            features = network["res5"](features)
        size = tuple(features.shape[-2:])
        rows = features.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * h * w, C)
        shape = (len(images), size[0] * size[1], -1)
        contrast = affinity = None
        if not affinity_only:
            contrast = network["head"](rows).float().view(shape)
        if "affinity_head" in network:
            affinity = network["affinity_head"](rows).view(shape)
        return _Maps(contrast, affinity, size)
