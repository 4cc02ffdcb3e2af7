"""BYOL's training steps against the paper's formulas (arXiv 2006.07733)."""

import pytest
import torch
from parts import PIXELS, cosine_schedule, pixels, prepare, small_trunk, spread, two_crops, unit
from training_step import Case, Restatement, check_one_process

from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.byol import BYOL
from region_pretrain.solver import cosine_momentum

MOMENTUM = 0.8  # low, so that a wrong step of the average is large


def byol_case(images: int = 4, precision: str = "float64", channels: str = "RGB") -> Case:
    torch.manual_seed(0)
    model = BYOL(
        backbone=Trunk(bottom_up=small_trunk()),
        feature="res5",
        projector=MLPHead(64, 24, 12),
        predictor=MLPHead(12, 24, 12),
        momentum=cosine_momentum(MOMENTUM),
        input_format=channels,
        **PIXELS,
    )
    return Case(prepare(model, precision), two_crops(images, steps=3), precision)


class SlowBYOL(Restatement):
    def __init__(self, case: Case, channels: str = "RGB") -> None:
        super().__init__(case)
        self.channels = channels

    def copies(self, twin):
        target = twin.target
        return [(twin.backbone, target["backbone"]), (twin.projector, target["projector"])]

    def momentum(self, progress):
        return cosine_schedule(MOMENTUM, progress)

    def features(self, trunk, x):
        return self.call(trunk, x)["res5"].mean(dim=(2, 3))

    def forward(self, batches):
        (twin,), (batch,) = self.twins, batches
        online, target = [], []
        for view in batch.views:
            x = pixels(view, self.precision.dtype, self.channels)
            y = self.call(twin.projector, self.features(twin.backbone, x))
            online.append(unit(self.call(twin.predictor, y)))
            y = self.call(twin.target["projector"], self.features(twin.target["backbone"], x))
            target.append(unit(y).detach())
        loss = 0.0
        for a, b in ((0, 1), (1, 0)):
            for p, z in zip(online[a], target[b], strict=True):
                squared = ((p - z) ** 2).sum()  # equation 2
                # Without the constant 2 of each order; divided by the one match, plus its epsilon.
                loss = loss + (squared - 2) / (1 + 1e-6) / len(batch)
        return [{"loss_image": loss, "embedding_std": spread(target[0])}]


@pytest.mark.parametrize(
    ("precision", "channels"),
    [("float64", "RGB"), ("float64", "BGR"), ("float32", "RGB"), ("bfloat16", "RGB")],
)
def test_three_steps(precision, channels):
    case = byol_case(4, precision, channels)
    check_one_process(case, SlowBYOL(case, channels))


def test_three_steps_in_two_processes(two_processes):
    case = byol_case(8)
    two_processes.check(case, SlowBYOL(case))
