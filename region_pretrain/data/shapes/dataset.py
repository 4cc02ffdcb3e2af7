"""Shapes on disk: PNG images and a COCO json, generated on first use from a seed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

from region_pretrain.data.catalog import register_once
from region_pretrain.data.shapes.scene import CLASSES, Difficulty, get_difficulty, render_scene
from region_pretrain.errors import UserError
from region_pretrain.registration import library_names

logger = logging.getLogger(__name__)

_VERSION = 1  # increment when the same seed yields another image
_SPLITS = ("unlabeled", "train", "val")


@dataclass(frozen=True)
class ShapesSpec:
    """The parameters of a Shapes data set, which determine its folder.

    Attributes:
        split: ``unlabeled``, ``train`` or ``val``; one seed yields different scenes in each.
        size: number of images.
        side: side of the images in pixels.
        seed: seed of the scenes. They do not depend on ``size``: image i of 100 is image i of 1000.
        difficulty: see :class:`~region_pretrain.data.shapes.scene.Difficulty`.
    """

    split: str
    size: int
    side: int = 128
    seed: int = 0
    difficulty: Difficulty = Difficulty()

    def __post_init__(self) -> None:
        if self.split not in _SPLITS:
            raise UserError(f"Shapes has no split {self.split!r}; it has {', '.join(_SPLITS)}")
        if self.size < 1 or self.side < 32:
            raise UserError(
                f"Shapes needs size >= 1 and side >= 32, not size={self.size}, side={self.side}"
            )

    @property
    def folder(self) -> Path:
        """The data set's folder under ``$DETECTRON2_DATASETS`` (default ``datasets``)."""
        facts = json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)
        digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
        return root / "shapes" / f"{self.split}_{self.size}x{self.side}px_seed{self.seed}_{digest}"

    def rng(self, index: int) -> np.random.Generator:
        """The random generator of one scene."""
        return np.random.default_rng([_VERSION, self.seed, _SPLITS.index(self.split), index])


def _render_to_disk(job: tuple[ShapesSpec, int, str]) -> tuple[dict, list[dict]]:
    spec, index, folder = job
    scene = render_scene(spec.side, spec.difficulty, spec.rng(index))
    name = f"{index:06d}.png"
    cv2.imwrite(os.path.join(folder, name), scene.image[..., ::-1])
    image = {"id": index, "file_name": name, "width": spec.side, "height": spec.side}
    annotations = []
    for item in scene.objects:
        x0, y0, x1, y1 = item.bbox
        annotations.append(
            {
                "image_id": index,
                "category_id": item.category + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": item.area,
                "iscrowd": 0,
                "segmentation": [ring.reshape(-1).tolist() for ring in item.visible],
                "material_id": item.material,
                "visible": item.area / item.polygon.area,
            }
        )
    return image, annotations


def make_shapes(spec: ShapesSpec, workers: int | None = None) -> Path:
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
    with file_lock(str(folder)):  # another process may be generating it
        if (folder / "annotations.json").is_file():
            return folder
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "images").mkdir(parents=True)
        jobs = [(spec, i, str(unfinished / "images")) for i in range(spec.size)]
        workers = min(workers or len(os.sched_getaffinity(0)), max(1, spec.size // 50))
        bar = {"total": spec.size, "desc": f"Shapes {spec.split}", "unit": "img"}
        if workers == 1:
            results = [_render_to_disk(job) for job in tqdm(jobs, **bar)]
        else:
            # Not multiprocessing.Pool, which stops workers by SIGTERM: jobs on a cluster ignore it.
            context = get_context("fork")
            with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (0,)) as pool:
                results = list(tqdm(pool.map(_render_to_disk, jobs, chunksize=16), **bar))
        coco = {
            "info": {"description": "Shapes, procedural", "version": str(_VERSION), **asdict(spec)},
            "images": [image for image, _ in results],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
            "annotations": [],
        }
        for annotation in (a for _, annotations in results for a in annotations):
            coco["annotations"].append({"id": len(coco["annotations"]) + 1, **annotation})
        (unfinished / "annotations.json").write_text(json.dumps(coco))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    logger.info("Generated Shapes %s: %d images in %s", spec.split, spec.size, folder)
    return folder


def register_shapes(name: str, spec: ShapesSpec) -> str:
    """Register a Shapes data set; it is generated when its records are first loaded.

    Registering a name again with the same spec has no effect.

    Returns:
        ``name``.

    Raises:
        UserError: the name is taken by another data set.
    """
    metadata = MetadataCatalog.get(name)

    def load() -> list[dict]:
        folder = make_shapes(spec)
        json_file = str(folder / "annotations.json")
        metadata.set(json_file=json_file, image_root=str(folder / "images"))
        return load_coco_json(json_file, str(folder / "images"), name, ["material_id", "visible"])

    if register_once(name, load, shapes=spec):
        metadata.set(
            json_file=str(spec.folder / "annotations.json"),
            image_root=str(spec.folder / "images"),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
    return name


def shapes(
    split: str, size: int, side: int = 128, seed: int = 0, level: str = "medium", **difficulty
) -> str:
    """Register a Shapes data set and return its name, for use in a config.

    Example::

        dataloader.train.dataset.names = L(shapes)(split="train", size=200, level="hard", side=256)

    Args:
        split, size, side, seed: see :class:`ShapesSpec`.
        level: ``easy``, ``medium`` or ``hard``.
        **difficulty: fields of :class:`~region_pretrain.data.shapes.scene.Difficulty` to override.

    Returns:
        The registered name.
    """
    spec = ShapesSpec(split, size, side, seed, get_difficulty(level, **difficulty))
    return register_shapes(f"shapes_{spec.folder.name}", spec)


for _split, _size in (("unlabeled", 2000), ("train", 200), ("val", 200)):
    library_names.add(register_shapes(f"shapes_{_split}", ShapesSpec(_split, _size)))
