"""Recipes: a source of regions and its filter, with a name and a version.

A recipe's id determines its boxes: ``soco-v1``, or ``soco-v1+mode=quality+working_size=500`` if
fields were changed. The behaviour of a version never changes; a change is a new version.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from region_pretrain.errors import UserError, did_you_mean
from region_pretrain.regions import filters
from region_pretrain.regions.selective_search import MODES, selective_search
from region_pretrain.regions.sources import grid_boxes, ground_truth_boxes, random_boxes

R = TypeVar("R", bound="Recipe")


class Found(NamedTuple):
    """The regions of an image, and what their source contained.

    Attributes:
        boxes: ``(N, 4)`` float32 XYXY in pixels of the image, half-open.
        given: number of boxes in the source.
        dropped: number of those that are not finite, or empty within the image.
        clipped: number of those that reached beyond the image by more than a pixel.
    """

    boxes: np.ndarray
    given: int
    dropped: int = 0
    clipped: int = 0


@dataclass(frozen=True)
class Recipe(ABC):
    """Finds the regions of an image.

    Attributes:
        name: name and version, e.g. ``soco-v1``.
    """

    name: str

    @abstractmethod
    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        """Find the regions of one image.

        Args:
            image: ``(H, W, 3)`` uint8 RGB, as :func:`region_pretrain.images.read_image` returns it.
            record: the image's Detectron2 dataset dict.
            rng: the image's own generator, the same in every run.

        Returns:
            ``(N, 4)`` float32 XYXY in pixels of the image, half-open; N may be 0.
        """

    def run(self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator) -> Found:
        """Find the regions of one image, and count the unusable boxes of their source."""
        boxes = self(image, record, rng)
        return Found(boxes, given=len(boxes))

    @property
    def parameters(self) -> dict[str, Any]:
        """All fields except the name, as JSON types."""
        fields = dataclasses.asdict(self)
        del fields["name"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @property
    def standard(self) -> Recipe:
        """The recipe of this name with its default fields."""
        return RECIPES[self.name]

    @property
    def id(self) -> str:
        """The name and all fields that differ from its defaults: ``soco-v1+min_side=16``."""
        standard = self.standard.parameters
        changed = {k: v for k, v in self.parameters.items() if v != standard[k]}
        return self.name + "".join(f"+{k}={_text(v)}" for k, v in sorted(changed.items()))

    def check(self) -> None:
        """Refuse invalid fields.

        Raises:
            UserError: names the field and its valid values.
        """
        fields = self.parameters
        if fields.get("mode", MODES[0]) not in MODES:
            self._refuse("mode", f"must be one of {', '.join(MODES)}")
        for field, value in fields.items():
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                self._refuse(field, "must be at least 0")
        aspect = fields.get("max_aspect", 1)
        if aspect < 1 and aspect != self.standard.parameters["max_aspect"]:  # 0: no limit
            self._refuse("max_aspect", "must be at least 1 (longer side / shorter side)")
        if fields.get("min_size_ratio", 0) > fields.get("max_size_ratio", 1):
            self._refuse("min_size_ratio", "must be at most max_size_ratio")

    def _refuse(self, field: str, rule: str) -> None:
        raise UserError(f"recipe {self.name}: {field}={_text(self.parameters[field])}: {rule}")


@dataclass(frozen=True)
class SizeRules(Recipe):
    """A recipe with SoCo's rules on the size and shape of boxes.

    Attributes:
        min_side: smallest side in pixels of the original image.
        max_aspect: largest ratio of the longer to the shorter side.
        min_size_ratio, max_size_ratio: range of sqrt(w h) / sqrt(W H).
    """

    min_side: float = 32.0
    max_aspect: float = 3.0
    min_size_ratio: float = 0.3
    max_size_ratio: float = 0.8

    def passing(self, boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, ...]:
        """Three ``(N,)`` bool: passes all rules, all but the size ratio, the side rule alone."""
        side = filters.min_side(boxes, self.min_side)
        shape = side & filters.max_aspect(boxes, self.max_aspect or np.inf)
        low, high = self.min_size_ratio, self.max_size_ratio
        return shape & filters.size_ratio(boxes, low, high, width, height), shape, side


@dataclass(frozen=True)
class SoCoRecipe(SizeRules):
    """Selective search with the filter "ratio3size0308" of SoCo's released code.

    If no box of an image passes, it keeps those that pass without the size ratio, else those that
    pass the side rule alone, else none (loaders then use the whole image).

    Attributes:
        mode, working_size: see
            :func:`~region_pretrain.regions.selective_search.selective_search`.
    """

    mode: str = "fast"
    working_size: int = 0

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        boxes = selective_search(image, self.mode, self.working_size)
        return self.filter(boxes, image.shape[1], image.shape[0])

    def filter(self, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
        """Apply the filter and its fallbacks.

        Args:
            boxes: ``(N, 4)`` XYXY: (x, y, x + w, y + h) for the published (x, y, w, h).
            width, height: size of the image in pixels.

        Returns:
            ``(M, 4)`` float32, in the same order.
        """
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        boxes = boxes[(boxes[:, :2] < boxes[:, 2:]).all(axis=1)]
        for keep in self.passing(boxes, width, height):
            if keep.any():
                return boxes[keep]
        return boxes[:0]


@dataclass(frozen=True)
class CCOPRecipe(Recipe):
    """Selective search and non-maximum suppression with random scores (CCOP).

    The published proposals have no seed; here an image's scores depend on ``seed`` and its key.

    Attributes:
        mode, working_size: see
            :func:`~region_pretrain.regions.selective_search.selective_search`.
        min_size: sqrt(w h) must be more than this, in pixels of the original image.
        max_aspect: the ratio of the longer to the shorter side must be less than this.
        nms_iou: a box is removed if its IoU with a survivor is above this.
        max_boxes: number of survivors kept, at random.
        seed: seed of the random scores.
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
        """Apply the rules on shape and size, before the suppression; keeps the order."""
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
        large = sides[:, 0] * sides[:, 1] > self.min_size**2
        return boxes[large & filters.max_aspect(boxes, self.max_aspect, strict=True)]


@dataclass(frozen=True)
class GridRecipe(Recipe):
    """Windows on regular grids, the same relative to every image.

    Attributes:
        divisions: for each number n, windows of 1/n of the image's sides.
        overlap: fraction of a window that overlaps with its neighbour.
    """

    divisions: tuple[int, ...] = (2, 3)
    overlap: float = 0.5

    def check(self) -> None:
        super().check()
        if not self.divisions or min(self.divisions) < 1:
            self._refuse("divisions", "must be whole numbers from 1 up, as in 2-3")
        if self.overlap >= 1:
            self._refuse("overlap", "must be less than 1")

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        return grid_boxes(image.shape[1], image.shape[0], self.divisions, self.overlap)


@dataclass(frozen=True)
class RandomRecipe(SizeRules):
    """Random boxes that pass the filter of :class:`SoCoRecipe`: a baseline for selective search.

    Attributes:
        count: boxes per image, fewer only if the image is too small for the filter.
        seed: seed of the boxes, together with the image's key.
    """

    count: int = 100
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.min_size_ratio == 0:
            self._refuse("min_size_ratio", "must be more than 0")

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        height, width = image.shape[:2]
        ratio = self.min_size_ratio, self.max_size_ratio
        drawn = random_boxes(width, height, 20 * self.count, ratio, self.max_aspect, rng)
        keep, _, _ = self.passing(drawn, width, height)  # sides were rounded
        return filters.canonical(drawn[keep][: self.count])


@dataclass(frozen=True)
class GroundTruthRecipe(Recipe):
    """The annotated boxes without crowds: an upper bound on the quality of regions."""

    def __call__(
        self, image: np.ndarray, record: Mapping[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        return ground_truth_boxes(record, image.shape[1], image.shape[0])


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        SoCoRecipe("soco-v1"),
        # the same filter for small images with small objects, such as the Shapes data sets
        SoCoRecipe("shapes-v1", min_side=10.0, min_size_ratio=0.12, max_size_ratio=0.8),
        CCOPRecipe("ccop-v1"),
        GridRecipe("grid-v1"),
        RandomRecipe("random-v1"),
        GroundTruthRecipe("ground_truth-v1"),
    )
}


#: Recipes of other programs' boxes, and the arguments that name their source.
ELSEWHERE = {
    "file-v1": "--from PATH",
    "detector-v1": "--from-detector CONFIG WEIGHTS",
    "features-v1": "--from-features CONFIG CHECKPOINT",
}


def get_recipe(recipe_id: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Look up a recipe by its id, and override fields.

    Args:
        recipe_id: a name, or an id with changed fields as in a store's manifest.
        overrides: field -> value, as text or in its own type; a tuple's text is ``2-3``.

    Returns:
        The recipe; without overrides its :attr:`Recipe.id` is ``recipe_id``.

    Raises:
        UserError: an unknown recipe or field, or an invalid value.
    """
    name, changes = parse_id(recipe_id)
    if name in ELSEWHERE:
        raise UserError(
            f"recipe {name} needs its source: region-pretrain regions {ELSEWHERE[name]}"
        )
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES, cutoff=0.4)
        raise UserError(f"no recipe is called {name!r}: must be one of {', '.join(RECIPES)}{hint}")
    return change(RECIPES[name], {**changes, **(overrides or {})})


def parse_id(recipe_id: str) -> tuple[str, dict[str, str]]:
    """Split a recipe's id into its name and the fields that differ from their defaults.

    Raises:
        UserError: a part of it is not ``field=value``.
    """
    name, *parts = recipe_id.split("+")
    changes = {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"recipe id {recipe_id!r}: {part!r} is not field=value")
        changes[field] = value
    return name, changes


def change(recipe: R, changes: Mapping[str, Any]) -> R:
    """A recipe with some fields changed; see :func:`get_recipe`."""
    fields = recipe.parameters
    values = {}
    for field, value in changes.items():
        if field not in fields:
            has = ", ".join(fields) or "none"
            raise UserError(f"recipe {recipe.name} has no field {field!r}; its fields: {has}")
        values[field] = _parse(recipe.name, field, value, getattr(recipe, field))
    recipe = dataclasses.replace(recipe, **values)
    recipe.check()
    return recipe


def _parse(name: str, field: str, value: Any, standard: Any) -> Any:
    """Convert ``value`` to the type of the field's standard value."""
    try:
        if isinstance(standard, tuple):
            return tuple(int(v) for v in (value.split("-") if isinstance(value, str) else value))
        if isinstance(standard, int) and int(value) != float(value):
            raise ValueError
        return type(standard)(value)
    except (TypeError, ValueError) as error:
        kind = {int: "a whole number", float: "a number", tuple: "whole numbers as in 2-3"}
        raise UserError(
            f"recipe {name}: {field}={value} is not {kind[type(standard)]}, unlike the default "
            f"{_text(standard)}"
        ) from error


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "-".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return text.replace("e+", "e")  # a plus sign separates fields
