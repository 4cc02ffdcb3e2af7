"""SoCo's training steps against the paper's formulas (arXiv 2106.02637)."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.modeling.poolers import ROIPooler
from parts import (
    PIXELS,
    cosine_schedule,
    dot,
    fpn_maps,
    pixels,
    prepare,
    small_detector,
    spread,
    unit,
    view,
)
from torch import nn
from torchvision.ops import roi_align
from training_step import Case, Restatement, check_one_process

from region_pretrain.data.batch import ViewBatch
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.narrow_resnet import narrow_resnet18_stages
from region_pretrain.projects.soco import SoCo
from region_pretrain.solver import cosine_momentum

MOMENTUM, BOUNDS, K = 0.8, (16, 32, 48, 60), 4


class Variant(NamedTuple):
    """``pairs``: which group of the first view's boxes each further view pairs with."""

    sizes: tuple[int, ...]
    sources: list[str | int]
    pairs: list[int]
    all_levels: bool = False
    c4: bool = False
    channels: str = "RGB"


RELEASED = Variant((64, 64, 48), ["crop", "crop"], [0, 1])  # 48 does not divide by 32
STAR = Variant((64, 64, 48, 32), ["crop", "crop", 0], [0, 1, 0], channels="BGR")
PAPER = Variant((64, 64, 32), ["crop", 0], [0, 0], all_levels=True)
C4 = Variant((64, 64), ["crop"], [0], c4=True)
ALL_LEVELS = RELEASED._replace(all_levels=True)

# Region ids of four images. First view: two groups of K, which share ids.
FIRST = [[3, 8, 1, 5, 1, 2, 3, 9], [7, 7, 7, 7, 4, 4, 6, 7], [0, 1, 2, 3, 0, 0, 1, 2], [1, 2] * 4]
OTHERS = [
    [[1, 3, 5, 8], [7, 7, 7, 7], [4, 5, 6, 7], [2, 2, 1, 3]],  # image 2 has no match with group 0
    [[9, 2, 1, 3], [4, 6, 4, 6], [2, 0, 0, 9], [1, 1, 2, 2]],
    [[8, 1, 8, 3], [7, 9, 9, 7], [3, 3, 1, 2], [2, 1, 2, 1]],
]


def soco_batch(variant: Variant, seed: int, precision: str) -> ViewBatch:
    rng = np.random.default_rng(seed)
    views = []
    for j, size in enumerate(variant.sizes):
        slots = K * (max(variant.pairs) + 1) if j == 0 else K
        corners = rng.uniform(0, size, (4, slots, 2, 2))
        boxes = torch.from_numpy(np.concatenate([corners.min(2), corners.max(2)], axis=2))
        boxes[0, 0] = torch.tensor([2.0, 3.0, 18.0, 19.0])  # exactly as large as the first bound
        boxes[3, 1] = torch.tensor([0.0, 0.0, size, size])  # unassigned in a view of 64
        valid = torch.ones(4, slots, dtype=torch.bool)
        valid[3, 2] = False
        rows = FIRST if j == 0 else OTHERS[j - 1]
        ids = torch.tensor([row[:slots] for row in rows])
        views.append(view(4, size, 10 * seed + j, boxes, ids, valid, precision))
    return ViewBatch(views, torch.arange(4))


def soco_case(variant: Variant, precision: str = "float64") -> Case:
    torch.manual_seed(0)
    if variant.c4:
        *stages, res5 = narrow_resnet18_stages(8)
        parts = dict(
            backbone=ResNet(BasicStem(3, 8, "SyncBN"), stages, out_features=["res4"]),
            in_features=["res4"],
            pooler=ROIPooler(14, [1 / 16], 0, "ROIAlignV2"),
            head=nn.Sequential(*res5),
            head_name="roi_heads.res5",
            projector=MLPHead(64, 24, 12),
        )
    else:
        detector = small_detector()
        parts = dict(
            backbone=instantiate(detector.backbone),
            in_features=["p2", "p3", "p4", "p5"],
            pooler=instantiate(detector.roi_heads.box_pooler),
            head=instantiate(detector.roi_heads.box_head),
            projector=MLPHead(32, 24, 12),
        )
    model = SoCo(
        **parts,
        predictor=MLPHead(12, 24, 12),
        momentum=cosine_momentum(MOMENTUM),
        level_scales=BOUNDS,
        sources=variant.sources,
        all_levels=variant.all_levels,
        input_format=variant.channels,
        **PIXELS,
    )
    batches = [soco_batch(variant, seed, precision) for seed in range(2)]
    return Case(prepare(model, precision), batches, precision)


def level_of(box) -> int | None:
    """Scale-aware level assignment, with the bounds of this test."""
    scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    if scale <= 16:
        return 0
    if scale <= 32:
        return 1
    if scale <= 48:
        return 2
    return 3 if scale <= 60 else None


class SlowSoCo(Restatement):
    def __init__(self, case: Case, variant: Variant) -> None:
        super().__init__(case)
        self.variant = variant

    def parts(self, twin):
        head = twin.roi_heads.res5 if self.variant.c4 else twin.roi_heads.box_head
        return {"backbone": twin.backbone, "head": head, "projector": twin.projector}

    def copies(self, twin):
        return [(module, twin.target[name]) for name, module in self.parts(twin).items()]

    def momentum(self, progress):
        return cosine_schedule(MOMENTUM, progress)

    def embed(self, network, x, seen, predictor=None):
        """Unit vectors by (image, slot)."""
        if self.variant.c4:
            maps, bins, samples = [self.call(network["backbone"], x)["res4"]], 14, 0
        else:
            maps, bins, samples = self.call(lambda x: fpn_maps(network["backbone"], x), x), 7, 2

        def through(levels):
            pooled = []
            for (i, _), box, level in zip(slots, boxes, levels, strict=True):
                scale = maps[level].shape[-1] / x.shape[-1]  # map pixels per view pixel
                image = maps[level][i : i + 1].float()
                pooled.append(roi_align(image, [box[None] * scale], bins, 1.0, samples, True))
            y = self.call(network["head"], torch.cat(pooled))
            y = self.call(network["projector"], y.mean(dim=(2, 3)) if self.variant.c4 else y)
            return unit(y if predictor is None else self.call(predictor, y))

        slots = [(i, k) for i in range(len(x)) for k in range(seen.boxes.shape[1])]
        boxes = [seen.boxes[i, k] for i, k in slots]
        levels = [0 if self.variant.c4 else level_of(box.tolist()) for box in boxes]
        if self.variant.all_levels:
            everywhere = [through([level] * len(slots)) for level in range(4)]
            vectors = [everywhere[level or 0][n] for n, level in enumerate(levels)]
        else:  # an unassigned box matches nothing, but is in the last level's BN statistics
            vectors = list(through([len(maps) - 1 if level is None else level for level in levels]))
        return dict(zip(slots, vectors, strict=True))

    def counts(self, seen, i, k):
        """Whether a slot takes part in matches."""
        assigned = self.variant.c4 or level_of(seen.boxes[i, k].tolist()) is not None
        return assigned and seen.valid[i, k]

    def forward(self, batches):
        (twin,), (batch,) = self.twins, batches
        online, target = [], []
        for seen in batch.views:
            x = pixels(seen, self.precision.dtype, self.variant.channels)
            online.append(self.embed(self.parts(twin), x, seen, twin.predictor))
            with torch.no_grad():
                target.append(self.embed(twin.target, x, seen))
        outputs = {}
        for j, group in enumerate(self.variant.pairs, start=1):
            first = [(0, group * K + k) for k in range(K)]
            other = [(j, k) for k in range(K)]
            loss = 0.0
            for predicted, averaged in ((first, other), (other, first)):
                for i in range(len(batch)):
                    cosines = []
                    for a, s in predicted:
                        for b, t in averaged:
                            one, two = batch.views[a], batch.views[b]
                            same = one.region_ids[i, s] == two.region_ids[i, t]
                            if same and self.counts(one, i, s) and self.counts(two, i, t):
                                cosines.append(dot(online[a][i, s], target[b][i, t]))
                    loss = loss - 2 * sum(cosines) / (len(cosines) + 1e-6) / len(batch)
            outputs[f"loss_view{j + 1}"] = loss
        return [outputs | {"embedding_std": spread(list(target[0].values()))}]


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        (RELEASED, "float64"),
        (ALL_LEVELS, "float64"),
        (STAR, "float64"),
        (PAPER, "float64"),
        (C4, "float64"),
        (RELEASED, "float32"),
        (RELEASED, "bfloat16"),
        (C4, "bfloat16"),
    ],
)
def test_two_steps(variant, precision):
    case = soco_case(variant, precision)
    check_one_process(case, SlowSoCo(case, variant))


@pytest.mark.parametrize("variant", [RELEASED, ALL_LEVELS])
def test_two_steps_in_two_processes(two_processes, variant):
    case = soco_case(variant)
    two_processes.check(case, SlowSoCo(case, variant))
