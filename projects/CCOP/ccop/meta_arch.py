"""CCOP's meta-architecture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import mean_over_ranks
from region_pretrain.modeling.losses import embedding_std, info_nce
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.pyramid import freeze_unread, trunk_and_pyramid_features, trunk_of
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.region_head import add_head
from region_pretrain.modeling.regions import assign_levels, check_levels, pool_boxes
from region_pretrain.modeling.shuffle import ShufflingBatchNorm
from region_pretrain.projects.ccop.candidates import (
    Candidates,
    choose_positives,
    draw_candidates,
    draw_noise,
    to_slots,
)
from region_pretrain.projects.ccop.curriculum import Curriculum, Difficulty
from region_pretrain.projects.ccop.losses import ANCHORS, distinct_pairs, intra_image_margin
from region_pretrain.projects.ccop.pictures import draw_choices

logger = logging.getLogger(__name__)


@dataclass
class _Keys:
    """Unit vectors of a key view."""

    image: Tensor  # (B, D)
    candidates: Tensor  # (C, D): of the valid candidates, ordered by (image, slot, candidate)
    regions: Tensor  # (R, D): of the regions themselves, with another draw of the head's dropout


@META_ARCH_REGISTRY.register()
class CCOP(PretrainingModel):
    """MoCo v2 on images, plus contrast of regions across images and within an image.

    A query region is trained to match the hardest of several boxes jittered around the same region
    in the key view, against regions of other images (InfoNCE). Within an image, each region's key
    must be closer to its own query than to other regions' queries (margin). Trunk and FPN are
    trained.

    Args:
        backbone: the detector's feature pyramid.
        trunk_feature: name of the trunk's map that represents the image.
        in_features: names of the maps that regions are pooled from, in the pooler's order.
        pooler: the detector's box pooler.
        image_head: from the trunk's map, averaged over space, to D channels.
        region_head: from a pooled region, flattened, to D channels.
        image_queue, region_queue: keys of other images and of their regions, D channels.
        curriculum: noise ranges and IoU floor of the candidates.
        momentum: schedule of the EMA momentum over the run, a function of its progress in [0, 1].
        temperature: temperature of both InfoNCE losses.
        image_weight, inter_weight, intra_weight: weights of the three losses; 0 switches one off.
        margin: margin of the intra-image loss.
        max_pair_iou: the intra-image loss compares regions whose IoU is below this.
        anchor: ``"column"`` as released, or ``"row"``
            (:func:`~region_pretrain.projects.ccop.losses.intra_image_margin`).
        num_candidates: number of jittered boxes per key region, in addition to the region itself.
        hardest: the positive is the valid candidate least similar to the query, otherwise a random
            one.
        level_scales: largest region scale of each level in view pixels
            (:func:`~region_pretrain.modeling.regions.assign_levels`).
        shuffle: use batch norm over groups of images in the backbone, with the key network's images
            shuffled over the groups of all processes. False keeps the detector's own norms, which
            should be SyncBN.
        norm_batch_size: images of such a group, at most; None: all of a process. 32 are those of a
            GPU in the released recipes.
        seed: seed of the candidates' noise and of the shuffling.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: a value is out of range, or the trunk has no such map.
    """

    detector_modules = ("backbone",)

    def __init__(
        self,
        *,
        backbone: Backbone,
        trunk_feature: str,
        in_features: Sequence[str],
        pooler: ROIPooler,
        image_head: nn.Module,
        region_head: nn.Module,
        image_queue: KeyQueue,
        region_queue: KeyQueue,
        curriculum: Curriculum,
        momentum: ParamScheduler,
        temperature: float = 0.2,
        image_weight: float = 1.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        margin: float = 0.4,
        max_pair_iou: float = 0.05,
        anchor: str = "column",
        num_candidates: int = 10,
        hardest: bool = True,
        level_scales: Sequence[float] = (48, 96, 192, 224),
        shuffle: bool = True,
        norm_batch_size: int | None = 32,
        seed: int | None = 0,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        if trunk_feature not in trunk_of(backbone).output_shape():
            known = ", ".join(trunk_of(backbone).output_shape())
            raise UserError(f"model.trunk_feature={trunk_feature} must be one of {known}")
        if anchor not in ANCHORS:
            raise UserError(f"model.anchor={anchor!r} must be one of {', '.join(ANCHORS)}")
        if temperature <= 0 or num_candidates < 0:
            raise UserError(
                f"model.temperature={temperature} must be positive and "
                f"model.num_candidates={num_candidates} at least 0"
            )
        self.weights = {"image": image_weight, "inter": inter_weight, "intra": intra_weight}
        for name, weight in self.weights.items():
            if weight < 0:
                raise UserError(f"model.{name}_weight={weight} must be at least 0")
        check_levels(backbone, in_features, pooler, level_scales)
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.shuffling = ShufflingBatchNorm(shuffle, seed, norm_batch_size)
        self.backbone = self.shuffling.prepare(backbone)
        freeze_unread(self.backbone, in_features, of_trunk=[trunk_feature])
        add_head(self, "roi_heads.box_pooler", pooler)
        self.image_head = image_head
        self.region_head = region_head
        self.key = MomentumCopy(self.query)
        self.momentum = momentum
        self.curriculum = curriculum
        image_queue.check_head(image_head, "model.image_queue")
        region_queue.check_head(region_head, "model.region_queue")
        self.image_queue, self.region_queue = image_queue, region_queue
        region_queue.of_images = False
        self.trunk_feature, self.in_features = trunk_feature, list(in_features)
        self.level_scales = list(level_scales)
        self.temperature = temperature
        self.margin, self.max_pair_iou, self.anchor = margin, max_pair_iou, anchor
        self.num_candidates = num_candidates
        self.hardest = hardest
        self.seed = seed or 0
        logger.info(
            "CCOP trains the detector's backbone and pyramid: its RPN, heads and predictors will "
            "start from random weights"
        )

    @property
    def query(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        return {
            "backbone": self.backbone,
            "image_head": self.image_head,
            "region_head": self.region_head,
        }

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Update the key network and the curriculum."""
        self.key.ema_update(self.momentum(iteration / max_iter))
        difficulty = self.curriculum.step(iteration, max_iter)
        get_event_storage().put_scalars(
            smoothing_hint=False,
            **{
                "curriculum/level": self.curriculum.level,
                "curriculum/center_range": difficulty.center,
                "curriculum/log_size_range": difficulty.log_size,
                "curriculum/iou_floor": difficulty.iou_floor,
            },
        )

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Losses of a batch from :class:`~region_pretrain.projects.ccop.CCOPViews`.

        Returns:
            ``loss_image``, ``loss_inter`` and ``loss_intra``, weighted; ``curriculum/*``: the
            fraction of valid candidates, and IoU and similarity of the positives;
            ``image_embedding_std`` and ``region_embedding_std``.
        """
        query_view, key_view = batch.views
        valid = key_view.valid  # (B, K), the same in both views
        candidates = self._candidates(key_view, batch.indices, self.curriculum.difficulty)
        image_query, query = self._queries(query_view)
        with torch.no_grad():
            keys = self._keys(key_view, candidates)
            mine = candidates.of(valid)
            positive = choose_positives(query, keys.candidates, mine, self.hardest)

        negatives = self.region_queue.negatives()
        inter = info_nce(query, positive.vectors, negatives, self.temperature)
        pairs = distinct_pairs(key_view.boxes, valid, self.max_pair_iou)
        slots = to_device(valid.flatten().nonzero().squeeze(1), query.device)
        intra = intra_image_margin(
            to_slots(query, slots, valid.shape),
            to_slots(keys.regions, slots, valid.shape),
            to_device(pairs, query.device),
            self.margin,
            self.anchor,
        )
        losses = {
            "image": info_nce(
                image_query, keys.image, self.image_queue.negatives(), self.temperature
            ).mean(),
            "inter": mean_over_ranks(inter.sum(), len(query)),
            "intra": mean_over_ranks(intra, int(pairs.sum())),
        }
        if self.training:
            self.curriculum.measure(positive.similarity)
            self._enqueue(keys.image, positive.vectors, valid.numel())

        outputs = {f"loss_{name}": self.weights[name] * loss for name, loss in losses.items()}
        outputs["image_embedding_std"] = embedding_std(keys.image)
        if len(query) > 1:
            outputs["region_embedding_std"] = embedding_std(keys.regions)
        fraction = mine.valid[:, :-1].float().mean(dim=1).nan_to_num().sum()
        fraction = to_device(fraction, query.device)
        sums = torch.stack([fraction, positive.iou.sum(), positive.similarity.sum()])
        names = ("valid_fraction", "chosen_iou", "chosen_similarity")
        for name, value in zip(names, mean_over_ranks(sums, len(query)), strict=True):
            outputs[f"curriculum/{name}"] = value
        return outputs

    @torch.no_grad()
    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]]:
        """Draw one region's candidates per image at the curriculum's start, middle and end.

        Args:
            batch: from :class:`~region_pretrain.projects.ccop.CCOPViews`.

        Returns:
            For each image three (H, W, 3) uint8 RGB pictures of its key view. The region is white,
            valid candidates are blue, invalid ones grey, and the chosen one is yellow and labelled
            with its cosine similarity to the query.
        """
        query_view, key_view = batch.views
        _, query = self._queries(query_view)
        columns = []
        for level in (0.0, 0.5, 1.0):
            candidates = self._candidates(key_view, batch.indices, self.curriculum.at(level))
            mine = candidates.of(key_view.valid)
            vectors = self._keys(key_view, candidates).candidates
            chosen = choose_positives(query, vectors, mine, self.hardest)
            columns.append(
                draw_choices(key_view, mine, chosen.index.tolist(), chosen.similarity.tolist())
            )
        return [list(row) for row in zip(*columns, strict=True)]

    def _queries(self, view: View) -> tuple[Tensor, Tensor]:
        """``(B, D)`` and ``(R, D)`` unit vectors of the images and of their valid regions."""
        network = self.query
        image, maps, size = self._features(network, view)
        pooled = self._pool(maps, view.boxes[view.valid], view.valid.nonzero()[:, 0], size)
        return image, _unit(network["region_head"](pooled))

    def _keys(self, view: View, candidates: Candidates) -> _Keys:
        """The key network on a view and its candidates, with shuffled images."""
        valid = candidates.valid & view.valid[..., None]  # (B, K, n + 1)
        permutation = self.shuffling.permutation(len(valid), self.curriculum.iteration)
        shuffled = permutation.shuffle(valid.to(torch.uint8)).bool()
        keys = self._embed_keys(
            permutation.shuffle_view(view), permutation.shuffle(candidates.boxes), shuffled
        )
        counts, own_counts = shuffled.sum(dim=(1, 2)), valid.sum(dim=(1, 2))
        # The region itself is the last candidate, and valid wherever there is a region.
        regions, own_regions = shuffled[..., -1].sum(dim=1), valid[..., -1].sum(dim=1)
        return _Keys(
            permutation.unshuffle(keys.image),
            permutation.unshuffle(keys.candidates, counts, own_counts),
            permutation.unshuffle(keys.regions, regions, own_regions),
        )

    def _embed_keys(self, view: View, boxes: Tensor, valid: Tensor) -> _Keys:
        """The key network on a view's images and on valid ones of ``(B, K, n + 1, 4)`` boxes."""
        image, maps, size = self._features(self.key, view)
        of, _, candidate = valid.nonzero().unbind(dim=1)
        # About half of the boxes are invalid; these are not even pooled.
        pooled = self._pool(maps, boxes[valid], of, size)
        regions = (candidate == self.num_candidates).nonzero().squeeze(1)
        regions = pooled.index_select(0, to_device(regions, pooled.device))
        head = self.key["region_head"]
        return _Keys(image, _unit(head(pooled)), _unit(head(regions)))

    def _features(
        self, network: Mapping[str, nn.Module], view: View
    ) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        """Image vectors ``(B, D)``, the maps to pool regions from, and the view's size."""
        images = self.preprocess(view)
        trunk, pyramid = trunk_and_pyramid_features(network["backbone"], images, self.in_features)
        image = _unit(network["image_head"](trunk[self.trunk_feature].mean(dim=(2, 3))))
        return image, [pyramid[name] for name in self.in_features], tuple(images.shape[-2:])

    def _pool(
        self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Pool ``(R, 4)`` boxes from their levels to ``(R, C S S)``."""
        levels = assign_levels(boxes, self.level_scales)
        pooler = self.roi_heads.box_pooler
        return pool_boxes(maps, boxes, image, levels, pooler, size).flatten(1)

    def _candidates(self, view: View, indices: Tensor, difficulty: Difficulty) -> Candidates:
        shape = (view.boxes.shape[1], self.num_candidates, 4)
        noise = draw_noise(self.seed, self.curriculum.iteration, indices.tolist(), shape)
        return draw_candidates(view.boxes, noise, difficulty, tuple(view.images.shape[-2:]))

    def _enqueue(self, image_keys: Tensor, region_keys: Tensor, slots: int) -> None:
        self.image_queue.enqueue(image_keys)
        # Processes have different numbers of regions, but the same number of slots.
        rows = torch.arange(len(region_keys), device=region_keys.device)
        padded = to_slots(region_keys, rows, (slots,))
        is_key = torch.arange(slots, device=region_keys.device) < len(region_keys)
        self.region_queue.enqueue(padded, is_key)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=1)
