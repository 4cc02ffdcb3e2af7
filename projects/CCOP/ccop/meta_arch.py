"""CCOP's meta-architecture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import mean_over_ranks
from region_pretrain.modeling.losses import embedding_std, info_nce
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.norms import use_local_batchnorm
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.pyramid import trunk_and_pyramid_features
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.regions import assign_levels, pool_boxes
from region_pretrain.modeling.shuffle import ImageShuffle
from region_pretrain.projects.ccop.candidates import (
    Candidates,
    draw_candidates,
    draw_noise,
    hardest_valid,
)
from region_pretrain.projects.ccop.curriculum import Curriculum, Difficulty
from region_pretrain.projects.ccop.losses import ANCHORS, distinct_pairs, intra_image_margin
from region_pretrain.projects.ccop.pictures import draw_choices

logger = logging.getLogger(__name__)


@dataclass
class _Keys:
    """What the key network says of a key view: of the images, of candidates, of the regions."""

    image: Tensor  # (B, D)
    candidates: Tensor  # (C, D), of the valid candidates in the order of (image, slot, candidate)
    regions: Tensor  # (R, D), of the regions themselves, with another draw of the heads' dropout


@dataclass
class _Choice:
    """The positives of a batch's regions."""

    index: Tensor  # (R,) which candidate
    vectors: Tensor  # (R, D)
    similarity: Tensor  # (R,) with the query
    iou: Tensor  # (R,) with the region


@META_ARCH_REGISTRY.register()
class CCOP(PretrainingModel):
    """MoCo v2 on images, and on their regions against other images' and each other.

    A query region must resemble the hardest of several boxes drawn around the same region in the
    key view, more than keys of other images (InfoNCE), and each region's key must be nearer to its
    own query than to other regions' of the image (margin). What is trained is trunk and FPN.

    Args:
        backbone: the detector's FPN.
        in_features: names of the maps that regions are pooled from, in the pooler's order.
        pooler: the detector's box pooler.
        image_head: from the trunk's last map, averaged over space, to D channels.
        region_head: from a pooled region, flattened, to D channels.
        image_queue, region_queue: keys of other images, and of other images' regions, D channels.
        curriculum: noise ranges and IoU floor of the candidates.
        momentum: schedule of the EMA momentum over the run, from 0 to 1.
        temperature: of both InfoNCE losses.
        image_weight, inter_weight, intra_weight: of the three losses; 0 switches one off.
        margin: of the intra-image loss.
        max_pair_iou: two regions of an image are told apart if their IoU is below this.
        anchor: ``"column"`` as released, or ``"row"``
            (:func:`~region_pretrain.projects.ccop.losses.intra_image_margin`).
        num_candidates: jittered boxes around each key region, besides itself.
        hardest: the positive is the valid candidate least similar to the query; ``False``: any.
        level_scales: largest region scale of each level in view pixels
            (:func:`~region_pretrain.modeling.regions.assign_levels`).
        shuffle: batch norm in the backbone per process, as released, and key images dealt to
            other processes. ``False``: the detector's own norms, which should be SyncBN.
        seed: of the candidates' noise and of the shuffle.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: a value that makes no sense, or a detector without an FPN.
    """

    detector_modules = ("backbone",)

    def __init__(
        self,
        *,
        backbone: FPN,
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
        seed: int | None = 0,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, FPN):
            raise UserError(
                f"CCOP pools regions from a feature pyramid, and the detector's backbone is a "
                f"{type(backbone).__name__}: take a detector with an FPN"
            )
        if anchor not in ANCHORS:
            raise UserError(f"model.anchor={anchor!r}: it is one of {', '.join(ANCHORS)}")
        if temperature <= 0 or num_candidates < 0:
            raise UserError(
                f"model.temperature={temperature} and model.num_candidates={num_candidates}: "
                "more than 0, and at least 0"
            )
        self.weights = {"image": image_weight, "inter": inter_weight, "intra": intra_weight}
        for name, weight in self.weights.items():
            if weight < 0:
                raise UserError(f"model.{name}_weight={weight}: at least 0")
        if len(level_scales) != len(in_features):
            raise UserError(
                f"model.level_scales={list(level_scales)}: one for each of {list(in_features)}"
            )
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.backbone = use_local_batchnorm(backbone) if shuffle else backbone
        self.roi_heads = nn.Module()
        self.roi_heads.add_module("box_pooler", pooler)
        self.image_head = image_head
        self.region_head = region_head
        self.key = MomentumCopy(self.query)
        self.momentum = momentum
        self.curriculum = curriculum
        self.image_queue, self.region_queue = image_queue, region_queue
        self.in_features = list(in_features)
        self.level_scales = list(level_scales)
        self.temperature = temperature
        self.margin, self.max_pair_iou, self.anchor = margin, max_pair_iou, anchor
        self.num_candidates = num_candidates
        self.hardest = hardest
        self.shuffle = shuffle
        self.seed = seed or 0
        logger.info(
            "CCOP trains the detector's backbone with its FPN; box and mask heads, RPN and "
            "predictors start anew in the detector"
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
        """Move key network and curriculum; the engine calls it before each step's forward."""
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
            ``loss_image``, ``loss_inter``, ``loss_intra``, weighted; of the candidates the share of
            valid ones, IoU and similarity of the chosen ones; and ``*embedding_std``.
        """
        query_view, key_view = batch.views
        valid = key_view.valid  # (B, K), the same in both views
        candidates = self._candidates(key_view, batch.indices, self.curriculum.difficulty)
        image_query, query = self._queries(query_view)
        with torch.no_grad():
            keys = self._keys(key_view, candidates)
            mine = candidates.of(valid)
            positive = self._choose(query, keys.candidates, mine)

        negatives = self.region_queue.negatives()
        inter = info_nce(query, positive.vectors, negatives, self.temperature)
        pairs = distinct_pairs(key_view.boxes, valid, self.max_pair_iou)
        slots = valid.flatten().nonzero().squeeze(1).to(query.device, non_blocking=True)
        intra = intra_image_margin(
            _to_slots(query, slots, valid.shape),
            _to_slots(keys.regions, slots, valid.shape),
            pairs.to(query.device, non_blocking=True),
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
        share = mine.valid[:, :-1].float().mean(dim=1).nan_to_num().sum()
        share = share.to(query.device, non_blocking=True)
        sums = torch.stack([share, positive.iou.sum(), positive.similarity.sum()])
        names = ("valid_share", "chosen_iou", "chosen_similarity")
        for name, value in zip(names, mean_over_ranks(sums, len(query)), strict=True):
            outputs[f"curriculum/{name}"] = value
        return outputs

    @torch.no_grad()
    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]]:
        """Candidates of one region of each image at the start, middle and end of the curriculum.

        Args:
            batch: from :class:`~region_pretrain.projects.ccop.CCOPViews`.

        Returns:
            For each image three (H, W, 3) uint8 RGB pictures of its key view: the region is white,
            valid candidates are blue, others grey, and the chosen one is yellow, with its cosine
            similarity to the query.
        """
        query_view, key_view = batch.views
        _, query = self._queries(query_view)
        columns = []
        for level in (0.0, 0.5, 1.0):
            candidates = self._candidates(key_view, batch.indices, self.curriculum.at(level))
            mine = candidates.of(key_view.valid)
            choice = self._choose(query, self._keys(key_view, candidates).candidates, mine)
            columns.append(
                draw_choices(key_view, mine, choice.index.tolist(), choice.similarity.tolist())
            )
        return [list(row) for row in zip(*columns, strict=True)]

    def _queries(self, view: View) -> tuple[Tensor, Tensor]:
        """``(B, D)`` and ``(R, D)`` unit vectors of the images and of their valid regions."""
        network = self.query
        image, maps, size = self._features(network, view)
        pooled = self._pool(maps, view.boxes[view.valid], view.valid.nonzero()[:, 0], size)
        return image, _unit(network["region_head"](pooled))

    def _keys(self, view: View, candidates: Candidates) -> _Keys:
        """The key network on a view, its images dealt to other processes where that is asked."""
        valid = candidates.valid & view.valid[..., None]  # (B, K, n + 1)
        if not self.shuffle or comm.get_world_size() == 1:
            return self._embed_keys(view, candidates.boxes, valid)
        shuffle = ImageShuffle(len(valid), (self.seed, self.curriculum.iteration))
        images, photometry = shuffle.deal(view.images), shuffle.deal(view.photometry)
        dealt = shuffle.deal(valid.to(torch.uint8)).bool()
        keys = self._embed_keys(
            replace(view, images=images, photometry=photometry),
            shuffle.deal(candidates.boxes),
            dealt,
        )
        one = torch.ones(len(valid), dtype=torch.int64)
        return _Keys(
            shuffle.collect(keys.image, one, one),
            shuffle.collect(keys.candidates, dealt.sum(dim=(1, 2)), valid.sum(dim=(1, 2))),
            # The region itself is the last candidate, and valid wherever there is a region.
            shuffle.collect(keys.regions, dealt[..., -1].sum(dim=1), valid[..., -1].sum(dim=1)),
        )

    def _embed_keys(self, view: View, boxes: Tensor, valid: Tensor) -> _Keys:
        """The key network on the images of a view, and on boxes ``(B, K, n + 1, 4)`` of them."""
        image, maps, size = self._features(self.key, view)
        of, _, candidate = valid.nonzero().unbind(dim=1)
        # Boxes that cannot be chosen are not even pooled: about half of them.
        pooled = self._pool(maps, boxes[valid], of, size)
        regions = (candidate == self.num_candidates).nonzero().squeeze(1)
        regions = pooled.index_select(0, regions.to(pooled.device, non_blocking=True))
        head = self.key["region_head"]
        return _Keys(image, _unit(head(pooled)), _unit(head(regions)))

    def _features(
        self, network: Mapping[str, nn.Module], view: View
    ) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        """Image vectors ``(B, D)``, the maps that regions are pooled from, the view's size."""
        images = self.preprocess(view)
        backbone = network["backbone"]
        trunk, pyramid = trunk_and_pyramid_features(backbone, images)
        last = trunk[backbone.in_features[-1]].mean(dim=(2, 3))
        image = _unit(network["image_head"](last))
        return image, [pyramid[name] for name in self.in_features], tuple(images.shape[-2:])

    def _pool(
        self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """``(R, C S S)`` of boxes ``(R, 4)`` on their levels."""
        levels = assign_levels(boxes, self.level_scales)
        pooler = self.roi_heads.box_pooler
        return pool_boxes(maps, boxes, image, levels, pooler, size).flatten(1)

    def _candidates(self, view: View, indices: Tensor, difficulty: Difficulty) -> Candidates:
        shape = (view.boxes.shape[1], self.num_candidates, 4)
        noise = draw_noise(self.seed, self.curriculum.iteration, indices.tolist(), shape)
        return draw_candidates(view.boxes, noise, difficulty, tuple(view.images.shape[-2:]))

    def _choose(self, query: Tensor, vectors: Tensor, candidates: Candidates) -> _Choice:
        """The positive of each region.

        Args:
            query: ``(R, D)``.
            vectors: ``(C, D)`` of the valid candidates, region by region.
            candidates: ``(R, n + 1)`` of them.
        """
        device = query.device
        slots = candidates.valid.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        vectors = _to_slots(vectors, slots, candidates.valid.shape)  # (R, n + 1, D)
        with torch.autocast(device.type, enabled=False):  # bfloat16 would choose another
            similarity = torch.einsum("rd,rnd->rn", query, vectors)
        valid = candidates.valid.to(device, non_blocking=True)
        order = similarity if self.hardest else torch.rand_like(similarity)
        index = hardest_valid(order, valid)
        pick = index[:, None]
        iou = candidates.iou.to(device, non_blocking=True)
        return _Choice(
            index,
            vectors.gather(1, pick[..., None].expand(-1, -1, vectors.shape[-1])).squeeze(1),
            similarity.gather(1, pick).squeeze(1),
            iou.gather(1, pick).squeeze(1),
        )

    def _enqueue(self, image_keys: Tensor, region_keys: Tensor, slots: int) -> None:
        self.image_queue.enqueue(image_keys)
        # Processes have different numbers of regions, and the same number of slots.
        rows = torch.arange(len(region_keys), device=region_keys.device)
        padded = _to_slots(region_keys, rows, (slots,))
        is_key = torch.arange(slots, device=region_keys.device) < len(region_keys)
        self.region_queue.enqueue(padded, is_key)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=1)


def _to_slots(vectors: Tensor, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``(N, D)`` vectors into ``(*shape, D)``, zero where none goes; ``slots``: flat positions."""
    flat = vectors.new_zeros((int(np.prod(shape)), vectors.shape[1]))
    return flat.index_copy(0, slots, vectors).view(*shape, vectors.shape[1])
