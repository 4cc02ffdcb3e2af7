"""The choice of a fine-tuning learning rate, on a split that the results do not use."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.metrics import read_results

logger = logging.getLogger(__name__)


def choose(results: Mapping[str, str], metric: str, out: str) -> str:
    """Choose the learning rate with the best metric; the first one wins a tie.

    Args:
        results: learning rate -> ``results.json`` of its trial.
        metric: ``task/metric``. A trial without it detected nothing, which counts as 0.
        out: file to write the override ``optimizer.lr=...`` to; a command line reads it as
            ``@FILE``.

    Returns:
        The learning rate, as written in ``results``.

    Raises:
        UserError: a trial has no results.
    """
    task, name = metric.split("/")
    values = {}
    for rate, path in results.items():
        if not os.path.isfile(path):
            raise UserError(f"the trial of optimizer.lr={rate} has no {path}: run it first")
        values[rate] = read_results(path).get(task, {}).get(name)
    best = max(values, key=lambda rate: values[rate] or 0.0)
    logger.info("%s by learning rate: %s; chosen: %s", metric, values, best)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    write_text_atomic(out, f"optimizer.lr={best}\n")
    return best


def read_choice(path: str) -> str:
    """The learning rate that :func:`choose` wrote."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip().partition("=")[2]
