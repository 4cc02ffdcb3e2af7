"""Subsets of a labelled data set, for fine-tuning with few labels.

In a config they replace ``get_detection_dataset_dicts``::

    dataloader.train.dataset = L(first_fraction)(names="coco_2017_train", fraction=0.05)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import get_detection_dataset_dicts

from region_pretrain.data.catalog import check_registered
from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)


def first_fraction(
    names: str | Sequence[str], fraction: float, filter_empty: bool = True
) -> list[dict[str, Any]]:
    """The first images of a data set, as in Mini-COCO (5 % or 10 % of train2017).

    The published subsets are the first entries of the list that Detectron2 trains on (images
    without annotations dropped), not a random sample: 5,863 images for 5 % of COCO, 11,726 for
    10 %.

    Args:
        names: one or several data sets, registered or named by path.
        fraction: fraction of the images to keep, in (0, 1]; rounded down, at least one image.
        filter_empty: drop images without annotations before counting.

    Returns:
        Detectron2 dataset dicts, in the data set's order.

    Raises:
        UserError: the fraction is not in (0, 1].
    """
    dicts, count = _load(names, fraction, filter_empty)
    return dicts[:count]


def random_fraction(
    names: str | Sequence[str], fraction: float, seed: int, filter_empty: bool = True
) -> list[dict[str, Any]]:
    """A random subset of a data set; with one seed, a smaller subset is contained in a larger one.

    Args:
        names, fraction, filter_empty: see :func:`first_fraction`.
        seed: seed of the sample; several seeds measure the variance due to the choice of images.

    Returns:
        Detectron2 dataset dicts, in the data set's order.

    Raises:
        UserError: the fraction is not in (0, 1].
    """
    dicts, count = _load(names, fraction, filter_empty)
    chosen = np.random.default_rng(seed).permutation(len(dicts))[:count]
    return [dicts[i] for i in sorted(chosen)]


def _load(
    names: str | Sequence[str], fraction: float, filter_empty: bool
) -> tuple[list[dict[str, Any]], int]:
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction} of {names}: must be above 0 and at most 1")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        check_registered(name)
    dicts = get_detection_dataset_dicts(names, filter_empty=filter_empty)
    # round() first: 0.29 * 100 is 28.999999999999996
    count = max(1, math.floor(round(len(dicts) * fraction, 6)))
    logger.info("Keeping %d of the %d images of %s", count, len(dicts), ", ".join(names))
    return dicts, count
