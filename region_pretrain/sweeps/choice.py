"""The learning rate of a start: the best one on scenes that the results do not use."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.metrics import read_results

logger = logging.getLogger(__name__)


def best_rate(values: Mapping[str, float | None]) -> str:
    """The rate with the highest value, of two equal ones the first.

    Args:
        values: rate, as it is written -> metric; None: the detector found nothing, which is 0.
    """
    return max(values, key=lambda rate: values[rate] or 0.0)


def choose(results: Mapping[str, str], metric: str, out: str) -> str:
    """Choose a learning rate, and write it as an override that a command line takes as ``@FILE``.

    Args:
        results: rate -> ``results.json`` of its trial.
        metric: ``task/metric``.
        out: the file, of one line ``optimizer.lr=RATE``.

    Returns:
        The rate.

    Raises:
        UserError: a trial has no results.
    """
    task, name = metric.split("/")
    values = {}
    for rate, path in results.items():
        if not os.path.isfile(path):
            raise UserError(f"the trial of optimizer.lr={rate} has no {path}")
        values[rate] = read_results(path).get(task, {}).get(name)
    best = best_rate(values)
    logger.info("%s by learning rate: %s; chosen: %s", metric, values, best)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    write_text_atomic(out, f"optimizer.lr={best}\n")
    return best


def read_choice(path: str) -> str:
    """The rate that :func:`choose` wrote."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip().partition("=")[2]
