"""Scenes of emoji: drawings pasted on a blend of two photographs.

All resampling is Pillow's on 8-bit images, which is the same in all of its versions.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from region_pretrain.data.emoji.vendors import CLASSES, drawings
from region_pretrain.data.generated import select_level
from region_pretrain.errors import UserError

_MIN_VISIBLE_SIDE = 4  # pixels; an object of which less is visible is not placed

#: Photographs in scikit-image's wheel, without known copyright restrictions -> sha256.
PHOTOGRAPHS: dict[str, str] = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
}


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of scenes. Lengths are fractions of the image's side.

    Attributes:
        objects: range of the number of objects in a scene.
        size: range of the longer side of an upright object.
        rotation: largest rotation of an object in either direction, in degrees.
        occlusion: largest fraction of an object that others or the image border may hide.
        hue: largest change of an object's hue in either direction, in degrees.
        saturation: range of the factor of an object's saturation; 0 is grey.
        brightness: range of the factor of an object's brightness.
        ground_contrast: range of the factor of the ground's contrast.
        noise: standard deviation of the sensor noise, in grey levels of 255.
    """

    objects: tuple[int, int] = (3, 6)
    size: tuple[float, float] = (0.2, 0.45)
    rotation: float = 45.0
    occlusion: float = 0.35
    hue: float = 40.0
    saturation: tuple[float, float] = (0.5, 1.2)
    brightness: tuple[float, float] = (0.7, 1.1)
    ground_contrast: tuple[float, float] = (0.6, 1.0)
    noise: float = 3.0


#: Level name -> difficulty.
LEVELS: dict[str, Difficulty] = {
    "easy": Difficulty(
        objects=(2, 4),
        size=(0.28, 0.5),
        rotation=20.0,
        occlusion=0.15,
        hue=15.0,
        saturation=(0.8, 1.2),
        brightness=(0.85, 1.1),
        ground_contrast=(0.4, 0.7),
        noise=2.0,
    ),
    "medium": Difficulty(),
    "hard": Difficulty(
        objects=(4, 8),
        size=(0.14, 0.42),
        rotation=180.0,
        occlusion=0.5,
        hue=180.0,
        saturation=(0.0, 1.3),
        brightness=(0.5, 1.2),
        ground_contrast=(0.8, 1.0),
        noise=6.0,
    ),
}


def get_difficulty(level: str, **overrides) -> Difficulty:
    """The difficulty of a level, with some fields overridden.

    Raises:
        UserError: unknown level or field.
    """
    return select_level("Emoji", LEVELS, level, **overrides)


@dataclass
class SceneObject:
    """One object of a scene.

    Attributes:
        category: index into :data:`~region_pretrain.data.emoji.vendors.CLASSES`.
        vendor: name of the vendor who drew it.
        patch: ``(h, w, 4)`` uint8 RGBA, the object's pixels including hidden ones.
        corner: row and column of the patch's upper left pixel; the patch may exceed the image.
        visible: ``(side, side)`` bool, the visible mask.
    """

    category: int
    vendor: str
    patch: np.ndarray
    corner: tuple[int, int]
    visible: np.ndarray

    @property
    def area(self) -> int:
        """Visible area in pixels."""
        return int(self.visible.sum())

    @property
    def full_area(self) -> int:
        """Area in pixels, including hidden parts and parts outside the image."""
        return int((self.patch[..., 3] >= 128).sum())

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """Bounding box of the visible part, XYXY with exclusive ends."""
        ys, xs = self.visible.any(axis=1).nonzero()[0], self.visible.any(axis=0).nonzero()[0]
        return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


@dataclass
class Scene:
    """An image ``(side, side, 3)`` uint8 RGB and its objects from back to front."""

    image: np.ndarray
    objects: list[SceneObject]


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """scikit-image's photographs, RGB, in the order of :data:`PHOTOGRAPHS`.

    Raises:
        UserError: one is missing or differs.
    """
    folder, images = Path(skimage.data.__file__).parent, []
    for name, digest in PHOTOGRAPHS.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise UserError(
                f"emoji: {path} is missing or not the expected photograph; "
                "reinstall scikit-image (tested: 0.26.0)"
            )
        images.append(Image.open(path).convert("RGB"))
    return tuple(images)


def _crop(side: int, rng: np.random.Generator) -> np.ndarray:
    """A random square crop of a random photograph: ``(side, side, 3)`` float64."""
    photograph = photographs()[int(rng.integers(len(PHOTOGRAPHS)))]
    width, height = photograph.size
    length = int(min(width, height) * rng.uniform(0.4, 1.0))
    x, y = (int(rng.integers(n - length + 1)) for n in (width, height))
    crop = photograph.resize((side, side), Image.Resampling.BICUBIC, (x, y, x + length, y + length))
    pixels = np.asarray(crop, np.float64)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _draw_ground(side: int, difficulty: Difficulty, rng: np.random.Generator) -> np.ndarray:
    """A blend of two crops with a random contrast and tint: ``(side, side, 3)`` float64."""
    weight = rng.uniform(0.5, 1.0)
    ground = weight * _crop(side, rng) + (1 - weight) * _crop(side, rng)
    mean = ground.mean(axis=(0, 1))
    target = mean.mean() + 0.6 * (mean - mean.mean()) + rng.normal(0, 10, 3)
    return target + rng.uniform(*difficulty.ground_contrast) * (ground - mean)


#: RGB -> luma and two chroma axes (YIQ).
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def recolour(patch: np.ndarray, hue: float, saturation: float, brightness: float) -> np.ndarray:
    """Change the colours of RGBA pixels; alpha and, for brightness 1, luma do not change.

    Args:
        patch: ``(h, w, 4)`` uint8.
        hue: rotation of the chroma plane in degrees.
        saturation: factor of the chroma.
        brightness: factor of everything.
    """
    angle = np.deg2rad(hue)
    c, s = saturation * np.cos(angle), saturation * np.sin(angle)
    matrix = brightness * np.linalg.inv(_YIQ) @ [[1, 0, 0], [0, c, -s], [0, s, c]] @ _YIQ
    colours = np.clip(np.floor(patch[..., :3] @ matrix.T + 0.5), 0, 255).astype(np.uint8)
    return np.concatenate([colours, patch[..., 3:]], axis=2)


def _draw_patch(
    drawing: Image.Image, side: int, difficulty: Difficulty, rng: np.random.Generator
) -> np.ndarray:
    """Scale, flip, rotate and recolour a drawing: ``(h, w, 4)`` uint8, without empty borders."""
    length = np.exp(rng.uniform(*np.log(difficulty.size))) * side
    scale = 2 * length / max(drawing.size)  # rotated at twice the size
    size = [max(2, round(n * scale)) for n in drawing.size]
    image = drawing.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-difficulty.rotation, difficulty.rotation)
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True).reduce(2)
    hue = rng.uniform(-difficulty.hue, difficulty.hue)
    saturation, brightness = (
        rng.uniform(*limits) for limits in (difficulty.saturation, difficulty.brightness)
    )
    return recolour(np.asarray(image.crop(image.getbbox())), hue, saturation, brightness)


def _overlap(shape: tuple[int, ...], corner: tuple[int, int], side: int) -> tuple[tuple, tuple]:
    """Slices of the image, and of a patch, where the patch is inside the image."""
    bounds = [(max(0, c), min(side, c + n)) for c, n in zip(corner, shape[:2], strict=True)]
    image = tuple(slice(a, max(a, b)) for a, b in bounds)
    patch = tuple(slice(a - c, max(a, b) - c) for (a, b), c in zip(bounds, corner, strict=True))
    return image, patch


def _full_mask(patch: np.ndarray, corner: tuple[int, int], side: int) -> np.ndarray:
    """``(side, side)`` bool: where the patch's alpha is at least one half."""
    mask = np.zeros((side, side), bool)
    image, inside = _overlap(patch.shape, corner, side)
    mask[image] = patch[inside][..., 3] >= 128
    return mask


def _visible_enough(item: SceneObject, visible: np.ndarray, difficulty: Difficulty) -> bool:
    if visible.sum() < max(1, (1 - difficulty.occlusion) * item.full_area):
        return False
    ys, xs = visible.any(axis=1).nonzero()[0], visible.any(axis=0).nonzero()[0]
    return min(ys[-1] - ys[0], xs[-1] - xs[0]) + 1 >= _MIN_VISIBLE_SIDE


def _place(
    side: int, difficulty: Difficulty, vendors: tuple[str, ...], rng: np.random.Generator
) -> list[SceneObject]:
    """Place objects that all stay visible enough; an object is dropped after 30 attempts."""
    objects: list[SceneObject] = []
    for _ in range(int(rng.integers(difficulty.objects[0], difficulty.objects[1] + 1))):
        category, vendor = int(rng.integers(len(CLASSES))), vendors[rng.integers(len(vendors))]
        patch = _draw_patch(drawings(vendor)[category], side, difficulty, rng)
        height, width = patch.shape[:2]
        for _ in range(30):
            corner = tuple(
                int(np.floor(rng.uniform(-0.2 * n, side - 0.8 * n))) for n in (height, width)
            )
            mask = _full_mask(patch, corner, side)
            item = SceneObject(category, vendor, patch, corner, mask)
            masks = [o.visible & ~mask for o in objects] + [mask]
            candidates = [*objects, item]
            if all(map(_visible_enough, candidates, masks, [difficulty] * len(masks))):
                for other, visible in zip(candidates, masks, strict=True):
                    other.visible = visible
                objects = candidates
                break
    return objects


def render_scene(
    side: int, difficulty: Difficulty, vendors: tuple[str, ...], rng: np.random.Generator
) -> Scene:
    """Draw one scene.

    A pixel belongs to the frontmost object that covers at least half of it.

    Args:
        side: image side in pixels.
        difficulty: see :class:`Difficulty`.
        vendors: whose drawings are used.
        rng: the scene's random generator.

    Returns:
        The image and its objects, at least one.
    """
    objects = _place(side, difficulty, vendors, rng)
    while not objects:
        objects = _place(side, difficulty, vendors, rng)
    canvas = _draw_ground(side, difficulty, rng)
    for item in objects:
        image, inside = _overlap(item.patch.shape, item.corner, side)
        patch = item.patch[inside].astype(np.float64)
        canvas[image] += patch[..., 3:] / 255 * (patch[..., :3] - canvas[image])
    canvas += rng.normal(0, difficulty.noise, canvas.shape)
    return Scene(np.clip(np.floor(canvas + 0.5), 0, 255).astype(np.uint8), objects)
