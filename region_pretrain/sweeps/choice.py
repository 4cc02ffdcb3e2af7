"""The choice of a fine-tuning learning rate, on a split that the results do not use."""

from __future__ import annotations

import logging
import os
import statistics
from collections import Counter
from collections.abc import Sequence

from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.metrics import DIVERGED, read_results

logger = logging.getLogger(__name__)


def mean_of_trials(values: Sequence[float | None]) -> float | None:
    """The mean metric of the trials of one learning rate.

    Args:
        values: one per trial; None if its detector found nothing or its training diverged, which
            counts as 0.

    Returns:
        None if no trial found anything.
    """
    if all(value is None for value in values):
        return None
    return statistics.fmean(value or 0.0 for value in values)


def choose(results: Sequence[Sequence[str]], metric: str, out: str) -> str:
    """Choose the learning rate with the best mean metric.

    Of those with the same mean, the one whose trials diverged least often; then the first one.

    Args:
        results: a pair for each trial: learning rate and ``results.json``.
        metric: ``task/metric``.
        out: file to write the override ``optimizer.lr=...`` to; a command line reads it as
            ``@FILE``.

    Returns:
        The learning rate, as written in ``results``.

    Raises:
        UserError: a trial has no results, none of them has the metric, or all have diverged.
    """
    task, name = metric.split("/")
    values: dict[str, list[float | None]] = {}
    known: list[str] = []
    diverged: Counter[str] = Counter()
    for rate, path in results:
        if not os.path.isfile(path):
            raise UserError(f"the trial of optimizer.lr={rate} has no {path}: run it first")
        found = read_results(path)
        diverged[rate] += DIVERGED in found
        for of, metrics in found.items():
            known += [f"{of}/{key}" for key, value in metrics.items() if value is not None]
        values.setdefault(rate, []).append(found.get(task, {}).get(name))
    if known and metric not in known:  # none at all: no detector found anything
        known = ", ".join(dict.fromkeys(known))
        raise UserError(f"the trials have no metric {metric}: choose from {known}")
    if diverged.total() == len(results):
        raise UserError(
            f"the trials of all learning rates have diverged ({', '.join(values)}): add a lower one"
        )
    means = {rate: mean_of_trials(found) for rate, found in values.items()}
    best = max(means, key=lambda rate: (means[rate] or 0.0, -diverged[rate]))
    logger.info("%s by learning rate: %s; chosen: %s", metric, values, best)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    write_text_atomic(out, f"optimizer.lr={best}\n")
    return best


def read_choice(path: str) -> str:
    """The learning rate that :func:`choose` wrote."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip().partition("=")[2]
