"""CCOP's training steps against the paper and its released code (arXiv 2111.13651)."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from fvcore.common.param_scheduler import LinearParamScheduler
from parts import PIXELS, prepare, small_detector, view
from slow_ccop import (
    CANDIDATES,
    DRAWS,
    MARGIN,
    MAX_PAIR_IOU,
    MOMENTUM,
    SEED,
    SLOTS,
    TEMPERATURE,
    WEIGHTS,
    SlowCCOP,
    Variant,
)
from training_step import Case, check_one_process

from region_pretrain.data.batch import ViewBatch
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.projects.ccop import CCOP, Curriculum, Feedback

# Two processes draw their dropout independently, so only the cases of one process have it.
RELEASED = Variant(dropout=0.3)
SHAPES = Variant(head_norm="SyncBN", channels="BGR")
SMALL = Variant(size=48, queue=3)  # 48 does not divide by 32; a step has up to 8 regions
ROW = Variant(anchor="row")
RANDOM = Variant(hardest=False)
CLOSED_LOOP = Variant(feedback=Feedback(set_point=0.2, gain=0.7, period=2))

# Regions of a key view of 64 pixels. In FOUR, the first is exactly as large as the first level's
# bound, its IoU with the second is exactly MAX_PAIR_IOU, and that of the last two is 0.03.
FOUR = [[2, 3, 18, 19], [14, 3, 30, 23], [26, 30, 60, 62], [4, 28, 28, 60]]
THREE = [[1, 1, 20, 24], [30, 5, 62, 40], [8, 44, 40, 63]]
TWO = [[3, 6, 40, 25], [20, 30, 62, 60]]
NESTED = [[0, 0, 64, 64], [5, 4, 60, 58], [0, 10, 60, 64]]
ONE, NONE = [[0, 0, 64, 64]], []
# Each step's four images, of which each of two processes has two. The numbers of regions and pairs
# are powers of two, since the mean over two processes divides by them in float32.
STEPS = [
    (FOUR, THREE, NONE, ONE),
    (NONE, NONE, NONE, NONE),
    (NONE, ONE, NESTED, NONE),
    (NONE, NONE, TWO, TWO),
]


def ccop_batch(step: int, size: int, precision: str) -> ViewBatch:
    rng = np.random.default_rng(step)
    corners = rng.uniform(0, 64, (2, 4, SLOTS, 2, 2))
    query, key = torch.from_numpy(np.concatenate([corners.min(3), corners.max(3)], axis=3))
    valid = torch.zeros(4, SLOTS, dtype=torch.bool)
    for i, regions in enumerate(STEPS[step]):
        slots = sorted(rng.permutation(SLOTS)[: len(regions)].tolist())
        valid[i, slots] = True
        key[i, slots] = torch.tensor(regions, dtype=torch.float64).view(-1, 4)
    views = [
        view(4, size, 2 * step + j, boxes * size / 64, valid=valid, precision=precision)
        for j, boxes in enumerate((query, key))
    ]
    return ViewBatch(views, torch.tensor([6, 2, 9, 4]) + step)


def ccop_case(variant: Variant, precision: str = "float64") -> Case:
    torch.manual_seed(0)
    detector = small_detector()
    head = dict(norm=variant.head_norm, dropout=variant.dropout)
    model = CCOP(
        backbone=instantiate(detector.backbone),
        trunk_feature="res5",
        in_features=["p2", "p3", "p4", "p5"],
        pooler=instantiate(detector.roi_heads.box_pooler),
        image_head=MLPHead(64, 24, 12, **head),
        region_head=MLPHead(16 * 49, 24, 12, **head),
        image_queue=KeyQueue(10, 12),
        region_queue=KeyQueue(variant.queue, 12),
        curriculum=Curriculum(feedback=variant.feedback),
        momentum=LinearParamScheduler(*MOMENTUM),
        temperature=TEMPERATURE,
        **{f"{name}_weight": weight for name, weight in WEIGHTS.items()},
        margin=MARGIN,
        max_pair_iou=MAX_PAIR_IOU,
        anchor=variant.anchor,
        num_candidates=CANDIDATES,
        hardest=variant.hardest,
        level_scales=[variant.size / 4 * level for level in (1, 2, 3, 4)],
        shuffle=variant.shuffle,
        seed=SEED,
        input_format=variant.channels,
        **PIXELS,
    )
    batches = [ccop_batch(step, variant.size, precision) for step in range(len(STEPS))]
    return Case(prepare(model, precision), batches, precision)


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        (RELEASED, "float64"),
        (SHAPES, "float64"),
        (SMALL, "float64"),
        (ROW, "float64"),
        (RANDOM, "float64"),
        (CLOSED_LOOP, "float64"),
        (RELEASED, "float32"),
        (RELEASED, "bfloat16"),
        (SHAPES, "bfloat16"),
    ],
)
def test_four_steps(variant, precision):
    case = ccop_case(variant, precision)
    torch.manual_seed(DRAWS)
    check_one_process(case, SlowCCOP(case, variant))


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        (Variant(), "float64"),
        (SHAPES, "float64"),
        (SMALL, "float64"),
        (CLOSED_LOOP, "float64"),
        (Variant(), "bfloat16"),
    ],
)
def test_four_steps_in_two_processes_with_shuffled_keys(two_processes, variant, precision):
    case = ccop_case(variant, precision)
    two_processes.check(case, SlowCCOP(case, variant, ranks=2))


@pytest.mark.parametrize("variant", [Variant(shuffle=False), SHAPES._replace(shuffle=False)])
def test_three_steps_in_two_processes_with_shared_statistics(two_processes, variant):
    # Batch norms of few vectors amplify rounding errors: after three steps above the tolerance.
    case = ccop_case(variant)
    case = case._replace(batches=case.batches[:3])
    two_processes.check(case, SlowCCOP(case, variant))
