"""Regions of a folder or a data set, in one call."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from region_pretrain.api.data import Data, DataSets, records_of
from region_pretrain.api.session import isolated
from region_pretrain.dataset_names import absolute, is_path_name
from region_pretrain.engine.methods import default_recipe
from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore, generate
from region_pretrain.regions.elsewhere import FileRecipe, attach, load_boxes, refuse_annotations
from region_pretrain.regions.preview import preview_image
from region_pretrain.regions.recipes import GroundTruthRecipe, Recipe, change, get_recipe
from region_pretrain.regions.summary import format_summary


class Regions(RegionStore):
    """A region store that knows its images.

    Attributes:
        images: what :func:`make_regions` was called with.
        records: the images as Detectron2 dicts.
        summary: counts, e.g. ``mean`` boxes per image; see
            :func:`region_pretrain.regions.summary.summarise`.
    """

    images: Data
    records: Sequence[dict]
    summary: dict[str, Any]

    def show(self, count: int = 4, max_boxes: int = 25) -> Image.Image:
        """Draw some images with their regions; see
        :func:`region_pretrain.regions.preview.preview_figure`."""
        return preview_image(self.records, self, count, max_boxes)

    def __str__(self) -> str:
        return f"{self.path}: recipe {self.manifest['recipe']}\n{format_summary(self.summary)}"


def make_regions(
    images: Data,
    method: str | None = None,
    *,
    recipe: str | Recipe | None = None,
    boxes: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    workers: int | None = None,
    max_unreadable: float = 0.01,
    **changes: Any,
) -> Regions:
    """Find the regions of images, as ``tools/make_regions.py`` does.

    Started again, an interrupted call continues, and a finished one returns at once.

    Args:
        images: see :data:`~region_pretrain.api.data.Data`.
        method: a method whose recipe to use.
        recipe: a recipe or its id instead, e.g. ``"grid-v1"``.
        boxes: a file or folder of boxes that another program computed instead, e.g. COCO's results;
            see :func:`region_pretrain.regions.elsewhere.formats.load_boxes`.
        out: path of the store; by default ``regions/<images>-<digits>-<recipe>.arrow``, with
            hexadecimal digits that stand for the absolute path of the images.
        workers: number of processes; by default one per core.
        max_unreadable: largest fraction of unreadable files.
        **changes: fields of the recipe, e.g. ``mode="quality"``, or of
            :class:`~region_pretrain.regions.elsewhere.recipe.FileRecipe` for ``boxes``, e.g.
            ``min_score=0.3``; they change its id.

    Returns:
        The store, which is also on disk.

    Raises:
        UserError: not one of ``method``, ``recipe`` and ``boxes``, a method without regions,
            invalid images or boxes, or see :func:`region_pretrain.regions.generate.make_regions`.
    """
    if [method, recipe, boxes].count(None) != 2:
        raise UserError("make_regions needs one of method=, recipe= and boxes=")
    given = None if boxes is None else load_boxes(os.fspath(boxes))
    if given is not None:
        recipe = change(FileRecipe("file-v1", source=given.digest), changes)
        changes = {}
    elif method is not None:
        recipe = default_recipe(method)
    if recipe is None:
        raise UserError(f"method {method} needs no regions; to make some anyway, give recipe=ID")
    if isinstance(recipe, str):
        recipe = get_recipe(recipe, changes)
    elif changes:
        raise UserError(f"{', '.join(changes)}: set the fields of the recipe object instead")
    data = DataSets()
    names = _absolute(data.name("images", images))
    with isolated(data.given):
        records = records_of(names, annotations=isinstance(recipe, GroundTruthRecipe))
        if boxes is not None:
            refuse_annotations(os.fspath(boxes), names)
            records = attach(records, given)
        path = _default_path(names, recipe) if out is None else os.path.expanduser(os.fspath(out))
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        summary = generate.make_regions(
            records, path, recipe, workers=workers, max_unreadable=max_unreadable
        )
    store = Regions.open(path)
    store.images, store.records, store.summary = images, records, summary or {}
    return store


def _absolute(names: Any) -> Any:
    if isinstance(names, list):
        return [_absolute(name) for name in names]
    return absolute(names) if isinstance(names, str) and is_path_name(names) else names


def digits_of(names: Any) -> str:
    """Eight hexadecimal digits that tell data sets apart, also folders with equal names."""
    return hashlib.sha256(_text(names).encode()).hexdigest()[:8]


def _text(names: Any) -> str:
    return str(OmegaConf.to_container(names)) if OmegaConf.is_config(names) else str(names)


def _default_path(names: Any, recipe: Recipe) -> str:
    text = _text(names)
    name = re.sub(r"\W+", "_", os.path.basename(text.rstrip("/'\"]")))[-40:].strip("_")
    return os.path.join("regions", f"{name or 'images'}-{digits_of(names)}-{recipe.id}.arrow")
