"""Subsets of a labelled data set, for fine-tuning with few labels.

In a config they replace ``get_detection_dataset_dicts``::

    dataloader.train.dataset = L(first_fraction)(names="coco_2017_train", fraction=0.05)

A fine-tuning writes the selected images to ``labelled_images.json`` in its output folder;
:func:`listed_images` reads that file, and public split files.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
)
from detectron2.utils import comm

from region_pretrain.data.catalog import check_registered
from region_pretrain.data.split_files import Split, find_images, read_split, short_names
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic

logger = logging.getLogger(__name__)

#: File in a run's output folder that lists the selected images.
SUBSET_FILE = "labelled_images.json"


class ImageSubset(list):
    """Dataset dicts of some images of a data set.

    Attributes:
        selection: how they were selected, and their ids and file names; JSON-serialisable.
    """

    def __init__(
        self,
        names: Sequence[str],
        dicts: Sequence[dict[str, Any]],
        chosen: Sequence[int],
        **how: Any,
    ) -> None:
        chosen = sorted(int(i) for i in chosen)
        super().__init__(dicts[i] for i in chosen)
        file_names = short_names([str(d.get("file_name", "")) for d in dicts])
        self.selection = {
            "datasets": list(names),
            **how,
            "image_ids": [d.get("image_id") for d in self],
            "file_names": [file_names[i] for i in chosen],
        }
        logger.info("Keeping %d of the %d images of %s", len(self), len(dicts), ", ".join(names))


def _dicts(names: list[str], filter_empty: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return get_detection_dataset_dicts(names, filter_empty=filter_empty, **options)
    except AssertionError as error:  # Detectron2's words for data without annotated boxes
        raise UserError(f"{', '.join(names)}: {error}") from None


def first_fraction(
    names: str | Sequence[str], fraction: float, filter_empty: bool = True, **options: Any
) -> ImageSubset:
    """The first images of a data set, as in Mini-COCO (5 % or 10 % of train2017).

    The published subsets are the first entries of the list that Detectron2 trains on (images
    without annotations dropped), not a random sample: 5,863 images for 5 % of COCO, 11,726 for
    10 %.

    Args:
        names: one or several data sets, registered or named by path.
        fraction: fraction of the images to keep, in (0, 1]; rounded down, at least one image.
        filter_empty: drop images without annotations before counting.
        options: further arguments of Detectron2's ``get_detection_dataset_dicts``.

    Returns:
        Detectron2 dataset dicts, in the data set's order.

    Raises:
        UserError: the fraction is not in (0, 1], or no image is left.
    """
    names = _checked(names, fraction)
    dicts = _dicts(names, filter_empty, options)
    chosen = range(_count(len(dicts), fraction))
    return ImageSubset(names, dicts, chosen, fraction=fraction, seed=None, split=None)


def random_fraction(
    names: str | Sequence[str],
    fraction: float,
    seed: int,
    filter_empty: bool = True,
    **options: Any,
) -> ImageSubset:
    """A random subset of a data set; with one seed, a smaller subset is contained in a larger one.

    Args:
        names, fraction, filter_empty, options: see :func:`first_fraction`.
        seed: seed of the sample; several seeds measure the variance due to the choice of images.

    Returns:
        Detectron2 dataset dicts, in the data set's order.

    Raises:
        UserError: the fraction is not in (0, 1], the seed is not a whole number, or no image is
            left.
    """
    names = _checked(names, fraction)
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed={seed}: must be a whole number, at least 0")
    dicts = _dicts(names, filter_empty, options)
    chosen = np.random.default_rng(seed).permutation(len(dicts))[: _count(len(dicts), fraction)]
    return ImageSubset(names, dicts, chosen, fraction=fraction, seed=seed, split=None)


def listed_images(
    names: str | Sequence[str],
    split: str,
    fraction: float | None = None,
    seed: int | None = None,
    filter_empty: bool = True,
    min_keypoints: int = 0,
    **options: Any,
) -> ImageSubset:
    """The images that a split file lists.

    Args:
        names: one or several data sets that contain the images, registered or named by path.
        split: the file, see :func:`~region_pretrain.data.split_files.read_split`. Placeholders in
            its name are replaced, as in ``instances_train2017.{seed}@{percent}.json``.
        fraction: selects one of several splits in the file, and replaces ``{percent}``.
        seed: selects one of several splits in the file, and replaces ``{seed}``.
        filter_empty: drop images without annotations, after they have been found.
        min_keypoints: drop images with fewer keypoints, after they have been found.
        options: further arguments of Detectron2's ``get_detection_dataset_dicts``.

    Returns:
        Detectron2 dataset dicts, in the data set's order.

    Raises:
        UserError: the file cannot be read, lacks this fraction or seed, or lists images that are
            not in the data sets.
    """
    names = _checked(names, fraction)
    listed = find_split(split, fraction, seed)
    dicts = get_detection_dataset_dicts(names, filter_empty=False, **options)
    kept = _filtered(dicts, filter_empty, min_keypoints)
    if listed.positions:  # in the list that Detectron2 trains on
        dicts = kept
    kept_ids = set(map(id, kept))
    chosen = find_images(listed, dicts, ", ".join(names))
    chosen = [i for i in chosen if id(dicts[i]) in kept_ids]
    name = os.path.basename(listed.path)
    return ImageSubset(names, dicts, chosen, fraction=fraction, seed=seed, split=name)


def find_split(split: str, fraction: float | None, seed: int | None) -> Split:
    """Read the list of a fraction and seed; see :func:`listed_images`.

    Raises:
        UserError: the file cannot be read, or lacks this fraction or seed.
    """
    split = os.path.expanduser(split)
    path = split if fraction is None else split.replace("{percent}", f"{100 * fraction:g}")
    path = path if seed is None else path.replace("{seed}", str(seed))
    return read_split(path, fraction, seed, several=path == split)


def write_subset(records: Sequence[dict[str, Any]], folder: str) -> None:
    """Write the images of an :class:`ImageSubset` to ``<folder>/labelled_images.json``.

    Other records, and other processes than the main one, write nothing.
    """
    if isinstance(records, ImageSubset) and comm.is_main_process():
        of_numpy = np.generic.item  # ids and seeds may be its numbers
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value, default=of_numpy)}"
            for key, value in records.selection.items()
        ]
        path = os.path.join(folder, SUBSET_FILE)
        write_text_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
        logger.info("the images to train on: %s", path)


def _checked(names: str | Sequence[str], fraction: float | None) -> list[str]:
    """The data sets as a list, registered."""
    number = isinstance(fraction, int | float)
    if fraction is not None and not (number and 0 < fraction <= 1):
        raise UserError(f"fraction={fraction} of {names}: must be above 0 and at most 1")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        check_registered(name)
    return names


def _count(total: int, fraction: float) -> int:
    # round() first: 0.29 * 100 is 28.999999999999996
    return max(1, math.floor(round(total * fraction, 6)))


def _filtered(
    dicts: list[dict[str, Any]], filter_empty: bool, min_keypoints: int
) -> list[dict[str, Any]]:
    """The records that ``get_detection_dataset_dicts`` keeps with the same arguments."""
    if filter_empty and dicts and "annotations" in dicts[0]:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if min_keypoints > 0:
        dicts = filter_images_with_few_keypoints(dicts, min_keypoints)
    return dicts
