"""Data sets that are generated on first use from a seed: PNG images and a COCO json."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from tqdm import tqdm

from region_pretrain.data.catalog import register_once
from region_pretrain.errors import UserError
from region_pretrain.files import locked
from region_pretrain.system import cores, process_context

logger = logging.getLogger(__name__)

SPLITS = ("unlabeled", "train", "val")

Level = TypeVar("Level")


@dataclass(frozen=True)
class SceneSpec(ABC):
    """The parameters of a generated data set, which determine its folder.

    A subclass sets the class variables and defines :meth:`draw`. Its own fields are parameters too.

    Attributes:
        split: ``unlabeled``, ``train`` or ``val``; one seed yields different scenes in each.
        size: number of images.
        side: side of the images in pixels.
        seed: seed of the scenes. They do not depend on ``size``: image i of 100 is image i of 1000.
    """

    split: str
    size: int
    side: int = 128
    seed: int = 0

    title: ClassVar[str]
    version: ClassVar[int]  # increment when the same seed yields another image
    classes: ClassVar[tuple[str, ...]]
    extra_keys: ClassVar[tuple[str, ...]]  # of an annotation, besides COCO's

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"{self.title} has no split {self.split!r}; it has {', '.join(SPLITS)}")
        if self.size < 1 or self.side < 32:
            raise UserError(
                f"{self.title} needs size >= 1 and side >= 32, "
                f"not size={self.size}, side={self.side}"
            )

    @property
    def folder(self) -> Path:
        """The data set's folder under ``$DETECTRON2_DATASETS`` (default ``datasets``)."""
        facts = json.dumps({"version": self.version, **asdict(self)}, sort_keys=True)
        digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
        root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
        name = f"{self.split}_{self.size}x{self.side}px_seed{self.seed}_{digest}"
        return Path(root, self.title.lower(), name)

    def rng(self, index: int) -> np.random.Generator:
        """The random generator of one scene."""
        return np.random.default_rng([self.version, self.seed, SPLITS.index(self.split), index])

    def prepare(self) -> None:  # noqa: B027
        """Load what :meth:`draw` needs, before worker processes start."""

    @abstractmethod
    def draw(self, index: int) -> tuple[np.ndarray, list[dict]]:
        """Draw one scene.

        Returns:
            The image ``(side, side, 3)`` uint8 RGB, and one dict per object with ``category_id``
            (starting at 1), ``bbox`` (XYWH), ``area``, ``segmentation`` and the extra keys.
        """


def select_level(title: str, levels: dict[str, Level], level: str, **overrides) -> Level:
    """The difficulty of a level, with some fields overridden.

    Args:
        title: the data set's name, for messages.
        levels: dataclass instances by the level's name.
        level: a key of ``levels``.
        **overrides: field values; a list becomes a tuple.

    Raises:
        UserError: unknown level or field.
    """
    if level not in levels:
        raise UserError(f"{title} has no level {level!r}; it has {', '.join(levels)}")
    known = [f.name for f in fields(levels[level])]
    if unknown := set(overrides) - set(known):
        raise UserError(
            f"the difficulty of {title} has no {', '.join(sorted(unknown))}; "
            f"it has {', '.join(known)}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    return replace(levels[level], **values)


def _draw_to_disk(job: tuple[SceneSpec, int, str]) -> tuple[dict, list[dict]]:
    spec, index, folder = job
    pixels, objects = spec.draw(index)
    name = f"{index:06d}.png"
    if not cv2.imwrite(os.path.join(folder, name), pixels[..., ::-1]):
        raise OSError(f"cannot write {os.path.join(folder, name)}")
    image = {"id": index, "file_name": name, "width": spec.side, "height": spec.side}
    return image, [{"image_id": index, "iscrowd": 0, **item} for item in objects]


def make_scenes(spec: SceneSpec, workers: int | None = None) -> Path:
    """Generate the data set unless it exists.

    Args:
        spec: its parameters.
        workers: number of processes; by default one per core.

    Returns:
        Its folder, with ``images/`` and ``annotations.json`` (COCO format).
    """
    folder = spec.folder
    if (folder / "annotations.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(str(folder)):  # another process may be generating it
        if (folder / "annotations.json").is_file():
            return folder
        spec.prepare()
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "images").mkdir(parents=True)
        jobs = [(spec, i, str(unfinished / "images")) for i in range(spec.size)]
        workers = min(workers or len(cores()), max(1, spec.size // 50))
        bar = {"total": spec.size, "desc": f"{spec.title} {spec.split}", "unit": "img"}
        if workers == 1:
            results = [_draw_to_disk(job) for job in tqdm(jobs, **bar)]
        else:
            # Not multiprocessing.Pool, which stops workers by SIGTERM: jobs on a cluster ignore it.
            with ProcessPoolExecutor(workers, process_context(), cv2.setNumThreads, (0,)) as pool:
                results = list(tqdm(pool.map(_draw_to_disk, jobs, chunksize=16), **bar))
        coco = {
            "info": {
                "description": f"{spec.title}, procedural",
                "version": str(spec.version),
                **asdict(spec),
            },
            "images": [image for image, _ in results],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(spec.classes)],
            "annotations": [],
        }
        for annotation in (a for _, annotations in results for a in annotations):
            coco["annotations"].append({"id": len(coco["annotations"]) + 1, **annotation})
        (unfinished / "annotations.json").write_text(json.dumps(coco))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    logger.info("Generated %s %s: %d images in %s", spec.title, spec.split, spec.size, folder)
    return folder


def register_scenes(spec: SceneSpec, name: str | None = None) -> str:
    """Register a generated data set; it is generated when its records are first loaded.

    Registering a name again with the same spec has no effect.

    Args:
        spec: its parameters.
        name: the data set's name; by default one that identifies ``spec``.

    Returns:
        The name.

    Raises:
        UserError: the name is taken by another data set.
    """
    name = name or f"{spec.title.lower()}_{spec.folder.name}"
    metadata = MetadataCatalog.get(name)

    def load() -> list[dict]:
        folder = make_scenes(spec)
        json_file, images = str(folder / "annotations.json"), str(folder / "images")
        metadata.set(json_file=json_file, image_root=images)
        return load_coco_json(json_file, images, name, list(spec.extra_keys))

    if register_once(name, load, generated=spec):
        metadata.set(
            json_file=str(spec.folder / "annotations.json"),
            image_root=str(spec.folder / "images"),
            evaluator_type="coco",
            thing_classes=list(spec.classes),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(spec.classes))},
        )
    return name
