"""Schedules over the course of training: learning-rate multipliers and EMA momentum.

All are fvcore ``ParamScheduler`` objects: stateless functions of ``iteration / max_iter``, so a run
shortened with ``train.max_iter`` keeps the shape of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from region_pretrain.errors import UserError


def check_schedule(multiplier: Any) -> ParamScheduler:
    """What ``lr_multiplier`` of a config builds.

    Raises:
        UserError: it is no ``ParamScheduler``.
    """
    if not isinstance(multiplier, ParamScheduler):
        raise UserError(
            f"lr_multiplier builds a {type(multiplier).__name__}, not an fvcore ParamScheduler: "
            "derive a class from it whose __call__(where) takes the share of training, 0 to 1"
        )
    return multiplier


def warmup_cosine(
    epochs: float,
    warmup_epochs: float,
    warmup_factor: float = 0.01,
    final_factor: float = 1.25e-7,
    rescale: bool = True,
) -> ParamScheduler:
    """Linear warm-up, then half a cosine over the remaining epochs, both per iteration.

    Args:
        epochs: length of training; only its ratio to ``warmup_epochs`` matters.
        warmup_epochs: length of the warm-up.
        warmup_factor: multiplier at the first iteration.
        final_factor: multiplier at the end; the default is 1e-6 of a learning rate of 8.0.
        rescale: if ``False``, the cosine spans the complete training and the warm-up replaces its
            beginning, as in mmcv.

    Returns:
        A learning-rate multiplier: ``warmup_factor`` -> 1 -> ``final_factor``.

    Raises:
        UserError: the warm-up is not shorter than the training.
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
            f"lr_multiplier.warmup_epochs={warmup_epochs} must be at least 0 and less than "
            f"train.epochs={epochs}"
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
    """Half a cosine over all epochs, multiplied by a linear warm-up over the first epochs.

    The cosine starts with the warm-up, unlike in :func:`warmup_cosine`, so the peak is slightly
    below 1.

    Args:
        epochs: length of training; only its ratio to ``warmup_epochs`` matters.
        warmup_epochs: length of the warm-up.
        warmup_factor: multiplier at the first iteration.
        final_factor: multiplier at the end; the default is 1e-4 of a learning rate of 16.

    Returns:
        A learning-rate multiplier.

    Raises:
        UserError: the warm-up is not shorter than the training.
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
        max_iter: length of training in iterations.
        steps: iterations at which the learning rate drops, ascending.
        gamma: factor of each drop.
        warmup_iters: length of the warm-up in iterations.
        warmup_factor: multiplier at the first iteration.

    Returns:
        A learning-rate multiplier.

    Raises:
        UserError: the steps or the warm-up exceed the training.
    """
    steps = list(steps)
    if steps != sorted(set(steps)) or any(not 0 < step < max_iter for step in steps):
        raise UserError(
            f"lr_multiplier.steps={steps} must be ascending and within (0, "
            f"lr_multiplier.max_iter={max_iter})"
        )
    if not 0 <= warmup_iters < max_iter:
        raise UserError(
            f"lr_multiplier.warmup_iters={warmup_iters} must be less than "
            f"lr_multiplier.max_iter={max_iter}"
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


class Timeline(NamedTuple):
    """Where a learning-rate multiplier changes in a run.

    Attributes:
        warmup: iterations of warm-up.
        warmup_length: the same as a fraction of the run.
        drops: iterations at which the learning rate drops.
        steps: the drops as configured, in iterations of a run of ``planned``.
        planned: the length that ``steps`` refer to; None for schedules without steps.
    """

    warmup: int
    warmup_length: float
    drops: list[int]
    steps: list[int]
    planned: int | None


def timeline(multiplier: ParamScheduler, max_iter: int) -> Timeline:
    """The iterations of a run at which Detectron2's schedules, or ours, change.

    Args:
        multiplier: a learning-rate multiplier; one of another kind has no warm-up and no drops.
        max_iter: length of the run in iterations.
    """
    start, scale, length = 0.0, 1.0, 0.0
    if isinstance(multiplier, WarmupParamScheduler):
        length = multiplier._lengths[0]
        if multiplier._interval_scaling[1] == "rescaled":
            start, scale = length, 1 - length
        multiplier = multiplier._schedulers[1]
    warmup = round(length * max_iter)
    if not isinstance(multiplier, MultiStepParamScheduler):
        return Timeline(warmup, length, [], [], None)
    steps, planned = list(multiplier._milestones), multiplier._num_updates
    drops = [math.ceil((start + scale * step / planned) * max_iter - 1e-6) for step in steps]
    return Timeline(warmup, length, drops, steps, planned)


def cosine_momentum(start: float, end: float = 1.0) -> ParamScheduler:
    r"""Momentum of the target network: ``1 - (1 - start) (1 + cos(pi k / K)) / 2`` for ``end=1``.

    Args:
        start: momentum at the first step.
        end: momentum after the last step.

    Returns:
        A function of ``k / K``, the fraction of completed steps (BYOL, arXiv 2006.07733).

    Raises:
        UserError: not ``0 <= start <= end <= 1``.
    """
    if not 0 <= start <= end <= 1:
        raise UserError(
            f"EMA momentum must rise within [0, 1], not from start={start} to end={end}"
        )
    return CosineParamScheduler(start, end)
