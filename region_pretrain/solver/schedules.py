"""Schedules over the fraction of training done: learning-rate multipliers and EMA momentum.

All are fvcore ``ParamScheduler``: functions of ``iteration / max_iter`` without state, so that a
run that is cut short with ``train.max_iter`` keeps the schedule's shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from region_pretrain.errors import UserError


def warmup_cosine(
    epochs: float,
    warmup_epochs: float,
    warmup_factor: float = 0.01,
    final_factor: float = 1.25e-7,
    rescale: bool = True,
) -> ParamScheduler:
    """Linear warm-up, then half a cosine over the epochs that remain, both per iteration.

    Args:
        epochs: length of the whole training; only its ratio to ``warmup_epochs`` counts.
        warmup_epochs: length of the warm-up.
        warmup_factor: multiplier at the first iteration.
        final_factor: multiplier at the end; the default is 1e-6 of a learning rate of 8.0.
        rescale: ``False``: the cosine runs over the whole training, and the warm-up stands in for
            its beginning (mmcv's way).

    Returns:
        A learning-rate multiplier: ``warmup_factor`` -> 1 -> ``final_factor``.

    Raises:
        UserError: the warm-up does not fit into the training.
    """
    _check_warmup(epochs, warmup_epochs)
    return WarmupParamScheduler(
        CosineParamScheduler(1.0, final_factor),
        warmup_factor=warmup_factor,
        warmup_length=warmup_epochs / epochs,
        rescale_interval=rescale,
    )


def _check_warmup(epochs: float, warmup_epochs: float) -> None:
    if not epochs or not 0 <= warmup_epochs < epochs:
        raise UserError(
            f"lr_multiplier: warmup_epochs={warmup_epochs} must be at least 0 and less than "
            f"epochs={epochs} (set train.epochs and lr_multiplier.warmup_epochs)"
        )


class _Product(ParamScheduler):
    """The product of schedulers."""

    def __init__(self, *factors: ParamScheduler) -> None:
        self.factors = factors

    def __call__(self, where: float) -> float:
        return math.prod(factor(where) for factor in self.factors)


def warmup_times_cosine(
    epochs: float,
    warmup_epochs: float,
    warmup_factor: float = 1e-4,
    final_factor: float = 6.25e-6,
) -> ParamScheduler:
    """Half a cosine over all epochs, multiplied by a linear warm-up over the first of them.

    Unlike :func:`warmup_cosine` the cosine starts with the warm-up, so that the peak stays a little
    below 1 (the schedule of mmcv).

    Args:
        epochs: length of the whole training; only its ratio to ``warmup_epochs`` counts.
        warmup_epochs: length of the warm-up.
        warmup_factor: multiplier at the first iteration.
        final_factor: multiplier at the end; the default is 1e-4 of a learning rate of 16.

    Returns:
        A learning-rate multiplier.

    Raises:
        UserError: the warm-up does not fit into the training.
    """
    _check_warmup(epochs, warmup_epochs)
    one = LinearParamScheduler(1.0, 1.0)
    warmup = WarmupParamScheduler(one, warmup_factor, warmup_length=warmup_epochs / epochs)
    return _Product(warmup, CosineParamScheduler(1.0, final_factor))


def warmup_multistep(
    max_iter: int,
    steps: Sequence[int],
    gamma: float = 0.1,
    warmup_iters: int = 1000,
    warmup_factor: float = 0.001,
) -> ParamScheduler:
    """Detectron2's schedule for detection: linear warm-up, then a drop by ``gamma`` at each step.

    Args:
        max_iter: length of the whole training in iterations.
        steps: iterations at which the learning rate drops, ascending.
        gamma: the factor of one drop.
        warmup_iters: length of the warm-up in iterations.
        warmup_factor: multiplier at the first iteration.

    Returns:
        A learning-rate multiplier.

    Raises:
        UserError: the steps or the warm-up do not fit into the training.
    """
    steps = list(steps)
    if steps != sorted(set(steps)) or any(not 0 < step < max_iter for step in steps):
        raise UserError(
            f"lr_multiplier.steps={steps} must ascend within (0, max_iter={max_iter}); "
            "change both together"
        )
    if not 0 <= warmup_iters < max_iter:
        raise UserError(
            f"lr_multiplier.warmup_iters={warmup_iters} must be less than max_iter={max_iter}"
        )
    return WarmupParamScheduler(
        MultiStepParamScheduler(
            values=[gamma**drop for drop in range(len(steps) + 1)],
            milestones=steps,
            num_updates=max_iter,
        ),
        warmup_factor=warmup_factor,
        warmup_length=warmup_iters / max_iter,
    )


def cosine_momentum(start: float, end: float = 1.0) -> ParamScheduler:
    r"""Momentum of the target network: ``1 - (1 - start) (1 + cos(pi k / K)) / 2`` for ``end=1``.

    Args:
        start: momentum at the first step.
        end: momentum after the last step.

    Returns:
        A function of ``k / K``, the fraction of the steps done (BYOL, arXiv 2006.07733).

    Raises:
        UserError: not ``0 <= start <= end <= 1``.
    """
    if not 0 <= start <= end <= 1:
        raise UserError(f"EMA momentum must rise within [0, 1]; got start={start}, end={end}")
    return CosineParamScheduler(start, end)
