"""Scenes of Shapes: textured objects on a textured ground, with clutter and occlusion.

Everything is drawn in grey; by default the only colour is a slight tint, nearly the same for the
whole scene. If every object had its own colour, pre-training would match regions by colour alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry import box as rectangle

from region_pretrain.data.generated import select_level
from region_pretrain.data.shapes.materials import MATERIALS
from region_pretrain.data.shapes.outlines import OUTLINES, sample_outline

CLASSES: tuple[str, ...] = tuple(OUTLINES)
_MATERIAL_NAMES = tuple(MATERIALS)
_SUPERSAMPLE = 8  # sub-pixels per pixel and axis, for the objects' soft edges
_MIN_VISIBLE_SIDE = 4.0  # pixels; an object of which less is visible is not placed


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of scenes. Lengths are fractions of the image's side.

    Attributes:
        objects: range of the number of objects in a scene.
        size: range of an object's diameter.
        contrast: range of the difference in mean luminance between object and ground.
        texture: strength (standard deviation of luminance) of the objects' materials.
        ground_texture: the same for the ground.
        typical: probability that an object has the typical material of its class.
        clutter: number of strokes that belong to no class.
        occlusion: largest fraction of an object that others may hide.
        rotation: largest rotation of an object in either direction, in degrees.
        noise: standard deviation of the sensor noise.
        saturation: strength of the scene's common tint; 0 is grey.
        object_saturation: strength of each object's own tint.
    """

    objects: tuple[int, int] = (3, 6)
    size: tuple[float, float] = (0.2, 0.45)
    contrast: tuple[float, float] = (0.0, 0.08)
    texture: float = 0.16
    ground_texture: float = 0.07
    typical: float = 0.7
    clutter: int = 8
    occlusion: float = 0.35
    rotation: float = 45.0
    noise: float = 0.02
    saturation: float = 0.01
    object_saturation: float = 0.005


_EASY = Difficulty(
    objects=(2, 4),
    size=(0.28, 0.5),
    contrast=(0.0, 0.1),
    texture=0.18,
    ground_texture=0.04,
    typical=0.85,
    clutter=3,
    occlusion=0.15,
    rotation=25.0,
    noise=0.01,
)
#: Level name -> difficulty.
LEVELS: dict[str, Difficulty] = {
    # What distinguishes the objects of a scene also distinguishes their classes, so matching
    # regions of two views brings objects of a class together.
    "clear": replace(_EASY, typical=1.0, clutter=0, ground_texture=0.02),
    "easy": _EASY,
    "medium": Difficulty(),
    "hard": Difficulty(
        objects=(4, 8),
        size=(0.14, 0.42),
        contrast=(0.0, 0.06),
        texture=0.13,
        ground_texture=0.09,
        typical=0.55,
        clutter=16,
        occlusion=0.5,
        rotation=180.0,
        noise=0.035,
    ),
}


def get_difficulty(level: str, **overrides) -> Difficulty:
    """The difficulty of a level, with some fields overridden.

    Raises:
        UserError: unknown level or field.
    """
    return select_level("Shapes", LEVELS, level, **overrides)


@dataclass
class SceneObject:
    """One object of a scene, in pixels.

    Attributes:
        category: index into :data:`CLASSES`.
        material: index of the material; equal to ``category`` if it is the typical one.
        polygon: the complete outline, including hidden parts and parts outside the image.
        visible: exterior rings ``(V, 2)`` of the visible part; together they are its exact mask.
    """

    category: int
    material: int
    polygon: Polygon
    visible: list[np.ndarray] = field(default_factory=list)

    @property
    def area(self) -> float:
        """Visible area in square pixels."""
        return float(sum(Polygon(ring).area for ring in self.visible))

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        """Bounding box of the visible part, XYXY."""
        points = np.concatenate(self.visible)
        return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


@dataclass
class Scene:
    """An image ``(side, side, 3)`` uint8 RGB and its objects from back to front."""

    image: np.ndarray
    objects: list[SceneObject]


def _rings(shape: shapely.Geometry) -> list[np.ndarray]:
    """Exterior rings that cover ``shape`` exactly; a part with a hole is split at the hole."""
    if shape.is_empty:
        return []
    if isinstance(shape, Polygon):
        if not shape.interiors:
            return [np.asarray(shape.exterior.coords)[:-1]] if shape.area > 0 else []
        x = shape.interiors[0].centroid.x
        x0, y0, x1, y1 = shape.bounds
        halves = (rectangle(x0, y0, x, y1), rectangle(x, y0, x1, y1))
        return [ring for half in halves for ring in _rings(shape.intersection(half))]
    # A difference of polygons may also contain points and lines, which have no area.
    return [ring for part in getattr(shape, "geoms", []) for ring in _rings(part)]


def _visible_parts(polygons: list[Polygon], side: int) -> list[shapely.Geometry]:
    """The visible part of each polygon; later polygons cover earlier ones."""
    frame, parts = rectangle(0, 0, side, side), []
    for i, polygon in enumerate(polygons):
        above = [p for p in polygons[i + 1 :] if p.intersects(polygon)]
        part = polygon.intersection(frame)
        parts.append(part.difference(shapely.union_all(above)) if above else part)
    return parts


def _place(difficulty: Difficulty, side: int, rng: np.random.Generator) -> list[SceneObject]:
    """Place objects that all stay visible enough; an object is dropped after 30 attempts."""
    objects: list[SceneObject] = []
    for _ in range(int(rng.integers(difficulty.objects[0], difficulty.objects[1] + 1))):
        category = int(rng.integers(len(CLASSES)))
        material = category
        if rng.random() >= difficulty.typical:
            others = [m for m in range(len(_MATERIAL_NAMES)) if m != category]
            material = int(rng.choice(others))
        low, high = np.log(difficulty.size)
        radius = np.exp(rng.uniform(low, high)) * side / 2
        turn = np.deg2rad(rng.uniform(-difficulty.rotation, difficulty.rotation))
        rotation = np.array([(np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))])
        outline = sample_outline(CLASSES[category], rng) @ rotation.T * radius
        for _ in range(30):
            center = rng.uniform(0.6 * radius, side - 0.6 * radius, 2)
            candidate = SceneObject(category, material, Polygon(outline + center))
            trial = [*objects, candidate]
            polygons = [o.polygon for o in trial]
            parts = _visible_parts(polygons, side)
            if all(_visible_enough(p, o, difficulty) for p, o in zip(parts, polygons, strict=True)):
                objects = trial
                break
    for item, part in zip(objects, _visible_parts([o.polygon for o in objects], side), strict=True):
        item.visible = _rings(part)
    return objects


def _visible_enough(part: shapely.Geometry, whole: Polygon, difficulty: Difficulty) -> bool:
    if part.area < (1 - difficulty.occlusion) * whole.area:
        return False
    if isinstance(part, MultiPolygon) and max(p.area for p in part.geoms) < 0.8 * part.area:
        return False  # an object cut in two does not look like one object
    x0, y0, x1, y1 = part.bounds
    return min(x1 - x0, y1 - y0) >= _MIN_VISIBLE_SIDE


def _coverage(rings: list[np.ndarray], side: int) -> np.ndarray:
    """``(side, side)`` float32: the fraction of each pixel that is inside the rings."""
    shift = 4  # fractional bits of cv2's coordinates
    mask = np.zeros((side * _SUPERSAMPLE,) * 2, np.uint8)
    # OpenCV's integer coordinates are the centres of sub-pixels, and it fills the border line as
    # well: half a sub-pixel too much on every side.
    points = [np.round((r * _SUPERSAMPLE - 0.5) * (1 << shift)).astype(np.int32) for r in rings]
    cv2.fillPoly(mask, points, 255, lineType=cv2.LINE_8, shift=shift)
    return cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _paint(canvas: np.ndarray, alpha: np.ndarray, value: np.ndarray | float) -> None:
    canvas += alpha * (value - canvas)


def _draw_clutter(canvas: np.ndarray, count: int, rng: np.random.Generator) -> None:
    """Draw strokes: edges that belong to no object."""
    side = canvas.shape[0]
    for _ in range(count):
        start = rng.uniform(0, side, 2)
        steps = rng.normal(0, side * 0.06, (int(rng.integers(2, 5)), 2))
        path = np.cumsum(np.concatenate([start[None], steps]), axis=0)
        width = rng.uniform(0.006, 0.02) * side
        stroke = shapely.LineString(path).buffer(width / 2 + 0.3, quad_segs=3)
        alpha = _coverage(_rings(stroke), side)
        sign = rng.choice((-1.0, 1.0))
        _paint(canvas, alpha, canvas + sign * rng.uniform(0.05, 0.2))


def render_scene(side: int, difficulty: Difficulty, rng: np.random.Generator) -> Scene:
    """Draw one scene.

    Args:
        side: image side in pixels.
        difficulty: see :class:`Difficulty`.
        rng: the scene's random generator.

    Returns:
        The image and its objects, at least one.
    """
    objects = _place(difficulty, side, rng)
    while not objects:
        objects = _place(difficulty, side, rng)

    unit = side / 20  # unit length of the textures
    # All grounds are alike: a pattern of its own would identify the image in each of its regions,
    # which would be enough to match them.
    ground = 0.8 * MATERIALS["clouds"](side, side, 2.5 * unit, rng)
    ground += 0.6 * MATERIALS["clouds"](side, side, 0.6 * unit, rng)
    canvas = 0.5 + difficulty.ground_texture * ground
    tint = np.zeros((side, side, 3), np.float32)
    below = difficulty.clutter // 2
    _draw_clutter(canvas, below, rng)

    for item in objects:
        outline = [np.asarray(item.polygon.exterior.coords)[:-1]]
        alpha = _coverage(outline, side)
        # A shadow and a rim set the object off from the ground.
        dx, dy = rng.uniform(-0.02, 0.02, 2) * side
        moved = cv2.warpAffine(alpha, np.float32([[1, 0, dx], [0, 1, dy]]), (side, side))
        _paint(canvas, 0.35 * cv2.GaussianBlur(moved, (0, 0), side * 0.02), canvas - 0.25)
        base = 0.5 + rng.choice((-1.0, 1.0)) * rng.uniform(*difficulty.contrast)
        texture = MATERIALS[_MATERIAL_NAMES[item.material]]
        value = base + difficulty.texture * texture(side, side, unit * rng.uniform(0.85, 1.2), rng)
        # Light from one side, so that mean brightness does not reveal the object.
        x0, y0, x1, y1 = item.polygon.bounds
        y, x = np.mgrid[:side, :side].astype(np.float32) + 0.5
        light = rng.normal(0, 0.12, 2)
        value = value + light[0] * (2 * (x - x0) / (x1 - x0) - 1)
        value = value + light[1] * (2 * (y - y0) / (y1 - y0) - 1)
        _paint(canvas, alpha, value)
        rim = shapely.LinearRing(outline[0]).buffer(max(0.5, side * 0.004), quad_segs=2)
        _paint(canvas, 0.6 * _coverage(_rings(rim), side) * (alpha > 0), base - 0.2)
        own = rng.normal(0, difficulty.object_saturation, 3).astype(np.float32)
        _paint(tint, alpha[..., None], own - own.mean())

    _draw_clutter(canvas, difficulty.clutter - below, rng)
    canvas = canvas + rng.normal(0, difficulty.noise, canvas.shape)
    # Equal mean and contrast in every scene, so that brightness does not identify the image.
    canvas = 0.5 + 0.19 * (canvas - canvas.mean()) / max(float(canvas.std()), 1e-6)
    common = rng.normal(0, difficulty.saturation, 3)
    image = canvas[..., None] + tint + (common - common.mean())
    return Scene(np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), objects)
