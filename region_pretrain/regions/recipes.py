"""Recipes: a source of regions with its filter, under a name and a version.

A recipe's id says everything that decides on its boxes: ``soco-v1``, or
``soco-v1+mode=quality+working_size=500`` where fields were changed. A version never changes what
it does; a change gets a new version.
"""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from region_pretrain.errors import UserError
from region_pretrain.regions import filters
from region_pretrain.regions.selective_search import MODES, selective_search
from region_pretrain.regions.sources import grid_boxes, ground_truth_boxes, random_boxes


@dataclass(frozen=True)
class Recipe(ABC):
    """A :class:`~region_pretrain.regions.sources.RegionSource` that knows its name.

    Attributes:
        name: with the version, e.g. ``soco-v1``.
    """

    name: str

    @abstractmethod
    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        """See :class:`~region_pretrain.regions.sources.RegionSource`."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Every field but the name, in a form that JSON keeps."""
        fields = dataclasses.asdict(self)
        del fields["name"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @property
    def id(self) -> str:
        """The name and every field that is not as the name says: ``soco-v1+min_side=16``."""
        standard = RECIPES[self.name].parameters
        changed = {k: v for k, v in self.parameters.items() if v != standard[k]}
        return self.name + "".join(f"+{k}={_text(v)}" for k, v in sorted(changed.items()))

    def check(self) -> None:
        """Refuse fields that make no sense; a recipe with a mode or a seed has those checked here.

        Raises:
            UserError: which field, and what it may be.
        """
        fields = self.parameters
        if fields.get("mode", MODES[0]) not in MODES:
            self._refuse("mode", f"it is one of {', '.join(MODES)}")
        for field, value in fields.items():
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                self._refuse(field, "it is at least 0")
        if fields.get("max_aspect", 1) < 1:
            self._refuse("max_aspect", "longer side / shorter side is at least 1")
        if fields.get("min_size_ratio", 0) > fields.get("max_size_ratio", 1):
            self._refuse("min_size_ratio", "it is at most max_size_ratio")

    def _refuse(self, field: str, rule: str) -> None:
        raise UserError(f"recipe {self.name}: {field}={_text(self.parameters[field])}: {rule}")


@dataclass(frozen=True)
class SoCoRecipe(Recipe):
    """Selective search with the filter "ratio3size0308" of SoCo's released code.

    An image on which nothing passes keeps what passes without the size rule, else what passes the
    side rule alone, else nothing (loaders then take the whole image).

    Attributes:
        mode: of :func:`~region_pretrain.regions.selective_search.selective_search`.
        working_size: the same; 0 is the native resolution.
        min_side: both sides are at least this, pixels of the original image.
        max_aspect: longer side over shorter side at most.
        min_size_ratio, max_size_ratio: range of sqrt(w h) / sqrt(W H).
    """

    mode: str = "fast"
    working_size: int = 0
    min_side: float = 32.0
    max_aspect: float = 3.0
    min_size_ratio: float = 0.3
    max_size_ratio: float = 0.8

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        boxes = selective_search(image, self.mode, self.working_size)
        return self.filter(boxes, image.shape[1], image.shape[0])

    def filter(self, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
        """The filter and its fallbacks.

        Args:
            boxes: ``(N, 4)`` XYXY with (x, y, x + w, y + h) for the published (x, y, w, h).
            width, height: of the image.

        Returns:
            ``(M, 4)`` float32, in the order given.
        """
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        boxes = boxes[(boxes[:, :2] < boxes[:, 2:]).all(axis=1)]
        big = filters.min_side(boxes, self.min_side)
        shaped = big & filters.max_aspect(boxes, self.max_aspect)
        low, high = self.min_size_ratio, self.max_size_ratio
        sized = shaped & filters.size_ratio(boxes, low, high, width, height)
        for keep in (sized, shaped, big):
            if keep.any():
                return boxes[keep]
        return boxes[:0]


@dataclass(frozen=True)
class CCOPRecipe(Recipe):
    """Selective search thinned by non-maximum suppression with random scores (CCOP).

    The published proposals have no seed; here an image's scores depend on ``seed`` and its key.

    Attributes:
        mode: of :func:`~region_pretrain.regions.selective_search.selective_search`.
        working_size: the same; 0 is the native resolution.
        min_size: sqrt(w h) is more than this, pixels of the original image.
        max_aspect: longer side over shorter side is less than this.
        nms_iou: a box goes if its IoU with a survivor is above this.
        max_boxes: survivors kept, at random.
        seed: of the random scores.
    """

    mode: str = "fast"
    working_size: int = 0
    min_size: float = 20.0
    max_aspect: float = 3.0
    nms_iou: float = 0.5
    max_boxes: int = 50
    seed: int = 0

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        boxes = self.filter(selective_search(image, self.mode, self.working_size))
        return filters.random_nms(boxes, self.nms_iou, self.max_boxes, rng)

    def filter(self, boxes: np.ndarray) -> np.ndarray:
        """The rules on shape and size, before the suppression; order kept."""
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
        large = sides[:, 0] * sides[:, 1] > self.min_size**2
        return boxes[large & filters.max_aspect(boxes, self.max_aspect, strict=True)]


@dataclass(frozen=True)
class GridRecipe(Recipe):
    """Windows on regular grids, the same relative to every image.

    Attributes:
        divisions: for each number n, windows of 1/n of the image's sides.
        overlap: part of a window that its neighbour covers too.
    """

    divisions: tuple[int, ...] = (2, 3)
    overlap: float = 0.5

    def check(self) -> None:
        super().check()
        if not self.divisions or min(self.divisions) < 1:
            self._refuse("divisions", "whole numbers from 1 up, as in 2-3")
        if self.overlap >= 1:
            self._refuse("overlap", "it is less than 1")

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        return grid_boxes(image.shape[1], image.shape[0], self.divisions, self.overlap)


@dataclass(frozen=True)
class RandomRecipe(Recipe):
    """Random boxes that pass the filter of :class:`SoCoRecipe`: what the search itself is worth.

    Attributes:
        count: boxes an image, fewer only where the image is too small for the filter.
        min_side, max_aspect, min_size_ratio, max_size_ratio: as in :class:`SoCoRecipe`.
        seed: of the draws, with the image's key.
    """

    count: int = 100
    min_side: float = 32.0
    max_aspect: float = 3.0
    min_size_ratio: float = 0.3
    max_size_ratio: float = 0.8
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.min_size_ratio == 0:
            self._refuse("min_size_ratio", "it is more than 0")

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        height, width = image.shape[:2]
        low, high = self.min_size_ratio, self.max_size_ratio
        drawn = random_boxes(width, height, 20 * self.count, (low, high), self.max_aspect, rng)
        keep = filters.min_side(drawn, self.min_side)
        keep &= filters.max_aspect(drawn, self.max_aspect)  # again: sides were rounded
        keep &= filters.size_ratio(drawn, low, high, width, height)
        return filters.canonical(drawn[keep][: self.count])


@dataclass(frozen=True)
class GroundTruthRecipe(Recipe):
    """The annotated boxes without crowds: how far better regions could take a method."""

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        return ground_truth_boxes(record, image.shape[1], image.shape[0])


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        SoCoRecipe("soco-v1"),
        # the same for small pictures with small objects, such as the Shapes data sets
        SoCoRecipe("shapes-v1", min_side=10.0, min_size_ratio=0.12, max_size_ratio=0.8),
        CCOPRecipe("ccop-v1"),
        GridRecipe("grid-v1"),
        RandomRecipe("random-v1"),
        GroundTruthRecipe("ground_truth-v1"),
    )
}


def get_recipe(recipe_id: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its id, with fields changed.

    Args:
        recipe_id: a name, or an id with changed fields as a store's manifest has it.
        overrides: field -> value, as text or in its type; a tuple's numbers joined with ``-``.

    Returns:
        The recipe; :attr:`Recipe.id` is ``recipe_id`` if nothing was changed.

    Raises:
        UserError: no such recipe or field, or a value that makes no sense.
    """
    name, *parts = recipe_id.split("+")
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no recipe is called {name!r}: there are {', '.join(RECIPES)}{hint}")
    changes: dict[str, Any] = {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"recipe id {recipe_id!r}: {part!r} is not field=value")
        changes[field] = value
    changes.update(overrides or {})
    standard = RECIPES[name]
    fields = standard.parameters
    values = {}
    for field, value in changes.items():
        if field not in fields:
            has = ", ".join(fields) or "none"
            raise UserError(f"recipe {name} has no field {field!r}; its fields: {has}")
        values[field] = _parse(name, field, value, getattr(standard, field))
    recipe = dataclasses.replace(standard, **values)
    recipe.check()
    return recipe


def _parse(name: str, field: str, value: Any, standard: Any) -> Any:
    """``value`` in the type of the field's standard value."""
    try:
        if isinstance(standard, tuple):
            return tuple(int(v) for v in (value.split("-") if isinstance(value, str) else value))
        if isinstance(standard, int) and int(value) != float(value):
            raise ValueError
        return type(standard)(value)
    except (TypeError, ValueError) as error:
        kind = {int: "a whole number", float: "a number", tuple: "whole numbers as in 2-3"}
        raise UserError(
            f"recipe {name}: {field}={value} is not {kind[type(standard)]} (now {_text(standard)})"
        ) from error


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
