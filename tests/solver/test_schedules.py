import math

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.model_zoo import get_config as get_detectron2_config
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

from region_pretrain.config import get_config
from region_pretrain.errors import UserError
from region_pretrain.solver import (
    check_schedule,
    cosine_momentum,
    warmup_cosine,
    warmup_multistep,
    warmup_times_cosine,
)
from region_pretrain.solver.schedules import timeline


def learning_rates(base_lr, multiplier, max_iter):
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=base_lr)
    scheduler = LRMultiplier(optimizer, multiplier, max_iter)
    lrs = []
    for _ in range(max_iter):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


def test_soco_learning_rate_at_batch_2048():
    per_epoch, epochs = 5, 100
    lrs = learning_rates(8.0, warmup_cosine(epochs, 10), epochs * per_epoch)
    assert lrs[0] == pytest.approx(0.08)
    assert lrs[5 * per_epoch] == pytest.approx(4.04)
    assert lrs[10 * per_epoch] == pytest.approx(8.0)
    assert all(lr >= 1e-6 for lr in lrs)
    for t in (60, 275, 499):  # (t - 50) / 450 of half a cosine from 8 to 1e-6
        cosine = (1 + math.cos(math.pi * (t - 50) / 450)) / 2
        assert lrs[t] == pytest.approx(1e-6 + (8.0 - 1e-6) * cosine, rel=1e-9)


def test_no_warm_up_starts_at_the_full_learning_rate():
    assert learning_rates(2.0, warmup_cosine(10, 0), 10)[0] == 2.0


def test_shipped_schedule_takes_its_epochs_from_train():
    schedule = get_config("common/schedule.py")
    cfg = OmegaConf.create({"train": {"epochs": 40}, "lr_multiplier": schedule.pretrain})
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.125) == pytest.approx(0.01 + 0.99 / 2)  # 5 of 10 epochs of 40
    assert multiplier(0.25) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["1x", "2x"])
def test_shipped_detection_schedules_are_detectron2s(name):
    ours = instantiate(getattr(get_config("common/schedule.py"), f"detection_{name}"))
    theirs = instantiate(get_detectron2_config("common/coco_schedule.py")[f"lr_multiplier_{name}"])
    max_iter = {"1x": 90_000, "2x": 180_000}[name]
    for t in [0, 1, 500, 999, 1000, 59_999, 60_000, 79_999, 80_000, 119_999, 120_000, 160_000]:
        where = t / max_iter
        if where < 1:
            # theirs warms up over 1000 iterations as well, from a thousandth
            assert ours(where) == pytest.approx(theirs(where), rel=1e-9), t


def test_multistep_drops_at_its_steps():
    lrs = learning_rates(1.0, warmup_multistep(100, [60, 80], warmup_iters=10), 100)
    assert [lrs[t] for t in (0, 5, 10, 59, 60, 79, 80, 99)] == pytest.approx(
        [0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_timeline_is_where_the_learning_rate_changes():
    """Also of a run that is shorter than planned, and of Detectron2's schedule."""
    ours = warmup_multistep(1000, [600, 800], warmup_iters=100)
    theirs = instantiate(get_detectron2_config("common/coco_schedule.py")["lr_multiplier_1x"])
    rescaled = WarmupParamScheduler(
        MultiStepParamScheduler([1, 0.1], 100, [50]), 0.01, 0.2, rescale_interval=True
    )
    for multiplier, warmup, steps, planned in (
        (ours, 0.1, [600, 800], 1000),
        (theirs, 1 / 90, [60_000, 80_000], 90_000),
        (rescaled, 0.2, [50], 100),
    ):
        for max_iter in (90, 333, 900):
            at, lrs = timeline(multiplier, max_iter), learning_rates(1.0, multiplier, max_iter)
            falls = [t for t in range(1, max_iter) if lrs[t] < 0.5 * lrs[t - 1]]
            assert (at.drops, at.steps, at.planned) == (falls, steps, planned)
            assert at.warmup == round(warmup * max_iter)
            assert lrs[at.warmup + 1] == 1 > lrs[max(0, at.warmup - 2)]
    assert timeline(warmup_cosine(100, 10), 500) == (50, 0.1, [], [], None)
    assert timeline(warmup_times_cosine(100, 10), 500) == (0, 0.0, [], [], None)


def test_ema_momentum_at_the_quarters():
    momentum = instantiate(L(cosine_momentum)(start=0.99))
    for where, expected in zip(
        (0, 0.25, 0.5, 0.75, 1), (0.99, 0.991464, 0.995, 0.998536, 1.0), strict=True
    ):
        assert momentum(where) == pytest.approx(expected, abs=5e-7)
        formula = 1 - (1 - 0.99) * (1 + math.cos(math.pi * where)) / 2
        assert momentum(where) == pytest.approx(formula, abs=1e-15)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: warmup_cosine(10, 10), "warmup_epochs=10"),
        (lambda: warmup_cosine(None, 10), "train.epochs"),
        (lambda: warmup_multistep(100, [60, 100]), "steps="),
        (lambda: warmup_multistep(100, [80, 60]), "steps="),
        (lambda: warmup_multistep(100, [60], warmup_iters=100), "warmup_iters=100"),
        (lambda: cosine_momentum(1.01), "momentum"),
    ],
)
def test_values_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_a_config_builds_must_be_a_schedule():
    schedule = warmup_multistep(100, [60], warmup_iters=10)
    assert check_schedule(schedule) is schedule
    with pytest.raises(UserError, match="lr_multiplier builds a function, not an fvcore ParamSch"):
        check_schedule(lambda where: 1 - where)


def test_warmup_times_cosine_at_published_values():
    """The released recipe of MCL: peak 16.0, 31,200 iterations, 3,127 of them warm-up."""
    schedule = warmup_times_cosine(epochs=31_200, warmup_epochs=3_127)
    lr = {k: 16 * schedule(k / 31_200) for k in (0, 1_000, 3_127, 15_600, 31_199)}
    assert lr[0] == pytest.approx(0.0016)
    assert lr[1_000] == pytest.approx(5.105, abs=1e-3)
    assert lr[3_127] == pytest.approx(15.607, abs=1e-3)
    assert lr[15_600] == pytest.approx(8.0, abs=1e-3)
    assert lr[31_199] == pytest.approx(1e-4, rel=1e-2)


def test_warmup_times_cosine_is_the_product():
    schedule = warmup_times_cosine(epochs=10, warmup_epochs=2, warmup_factor=0.1, final_factor=0.0)
    for where in (0.0, 0.05, 0.1, 0.199, 0.2, 0.6, 1.0):
        warmup = min(1.0, 0.1 + 0.9 * where / 0.2)
        cosine = 0.5 * (1 + math.cos(math.pi * where))
        assert schedule(where) == pytest.approx(warmup * cosine, abs=1e-9)
    with pytest.raises(UserError, match="warmup_epochs=10"):
        warmup_times_cosine(epochs=10, warmup_epochs=10)
