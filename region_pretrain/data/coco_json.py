"""COCO jsons: loading, with what labelling tools get wrong fixed.

A json that needed fixing is written again to a cache folder, for pycocotools and ``COCOEvaluator``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from region_pretrain.data.coco_annotations import compressed_rle
from region_pretrain.data.coco_fixes import (
    TWO_TYPES,
    VERSION,
    CocoFixer,
    SizesDiffer,
    files_agree,
)
from region_pretrain.data.findings import Finding
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic

logger = logging.getLogger(__name__)

_FIXES = "region_pretrain_fixes"  # key of a fixed json: what was found in the original


@dataclass
class CocoData:
    """A loaded COCO json.

    Attributes:
        records: Detectron2 dataset dicts sorted by image id, as ``load_coco_json`` returns them;
            without ``annotations`` if the json has none.
        classes: class names.
        category_ids: the classes' ids in :attr:`json_file`.
        findings: what was found; see :class:`~region_pretrain.data.findings.Finding`.
        source: the given json.
        image_root: the given image folder.
        all_sizes: whether all images' sizes were compared with their files.
        keypoint_names: names of a box's keypoints; empty if the categories have none.
    """

    records: list[dict[str, Any]]
    classes: list[str]
    category_ids: list[int]
    findings: list[Finding]
    source: str
    image_root: str
    all_sizes: bool = False
    keypoint_names: list[str] = field(default_factory=list)

    @property
    def keypoints(self) -> dict[str, list]:
        """Detectron2's metadata of keypoints; flips exchange ``left`` and ``right`` in names, which
        may have capital letters."""
        names = self.keypoint_names
        lower = {name.lower(): name for name in names}
        left = [name for name in names if "left" in name.lower()]
        pairs = [(name, lower.get(name.lower().replace("left", "right"))) for name in left]
        pairs = [pair for pair in pairs if pair[1] is not None]
        return {"keypoint_names": names, "keypoint_flip_map": pairs} if names else {}

    @property
    def fixed(self) -> bool:
        """Whether the records differ from what the json contains."""
        return any(finding.fixed for finding in self.findings)

    @functools.cached_property
    def json_file(self) -> str:
        """The given json, or a fixed copy that pycocotools accepts, written on first use."""
        if not self.fixed:
            return self.source
        path = _cached_path(self.source, self.image_root)
        if _read_cached(path, self.all_sizes) is None:
            data, findings = _read_and_fix(self.source, self.image_root, self.all_sizes)
            data[_FIXES] = {
                "source": self.source,
                "all_sizes": self.all_sizes,
                "findings": [vars(finding) for finding in findings],
            }
            write_text_atomic(path, json.dumps(data))
        return path


def load_coco(json_file: str, image_root: str, all_sizes: bool = False) -> CocoData:
    """Load a COCO json, and fix it where that is possible.

    Args:
        json_file: path or URL of the json. ``annotations`` may be missing.
        image_root: folder that its file names are relative to.
        all_sizes: compare the size of every image with its file. By default a sample is compared,
            and all if one of them differs.

    Returns:
        The records, and what was fixed.

    Raises:
        UserError: something that cannot be fixed: no images or categories, an unknown category, two
            images with one id, missing files, or sizes that differ from the files' in more than
            their EXIF orientation.
    """
    json_file, image_root = os.path.expanduser(json_file), os.path.expanduser(image_root)
    if not PathManager.isfile(json_file):
        raise UserError(
            f"no such file: {json_file}, the COCO json of the images in {image_root}; built-in "
            "data sets are expected in the folder that DETECTRON2_DATASETS names"
        )
    path = _cached_path(json_file, image_root)
    cached = _read_cached(path, all_sizes)
    if cached is not None and not files_agree(cached[0]["images"], image_root):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            os.remove(path)  # the files have changed since, but the json has not
        cached = None
    if cached is not None:
        data, findings = cached
    else:
        data, findings = _read_and_fix(json_file, image_root, all_sizes)
    categories = sorted(data.get("categories") or (), key=lambda category: category["id"])
    ids = [category["id"] for category in categories]
    names = [category["name"] for category in categories]
    records = _records(data, image_root, {category_id: n for n, category_id in enumerate(ids)})
    named = [category["keypoints"] for category in categories if category.get("keypoints")]
    keypoints = named[0] if named and named.count(named[0]) == len(named) else []
    return CocoData(records, names, ids, findings, json_file, image_root, all_sizes, keypoints)


def mend_registered(name: str, evaluated: bool = False) -> CocoData | None:
    """Fix the COCO json of a registered data set, for training and for ``COCOEvaluator``.

    A data set of ``register_coco_instances`` then has the fixed records and the fixed json in its
    metadata. One with a loader of its own keeps its records.

    Args:
        name: a registered data set.
        evaluated: whether ``COCOEvaluator`` will read its json. A data set without one gets one.

    Returns:
        The loaded json; None if the data set has none or does not need it.

    Raises:
        UserError: the json cannot be fixed, see :func:`load_coco`, or the metadata contradict it.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type", "coco") != "coco":
        return None
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file is None:
        if evaluated:
            metadata.json_file = json_of_records(name)
        return None
    owner = DatasetCatalog[name].__module__
    stock, ours = owner == "detectron2.data.datasets.coco", owner == __name__
    if not stock and (not evaluated or image_root is None or not PathManager.isfile(json_file)):
        return None
    data = load_coco(json_file, image_root)
    if stock:
        _register_again(name, data)
    elif not ours and any(finding.what == TWO_TYPES for finding in data.findings):
        raise UserError(f"{json_file} (data set {name!r}) has image ids of two types: use integers")
    if evaluated and data.fixed:
        del metadata.json_file
        metadata.json_file = data.json_file
    return data


def _register_again(name: str, data: CocoData) -> None:
    metadata, source, image_root = MetadataCatalog.get(name), data.source, data.image_root
    handed_over = [data.records]  # loaded once; released by the first use

    def load() -> list[dict[str, Any]]:
        return handed_over.pop() if handed_over else load_coco(source, image_root).records

    facts = {
        "thing_classes": data.classes,
        "thing_dataset_id_to_contiguous_id": {i: n for n, i in enumerate(data.category_ids)},
    }
    for key, value in facts.items():
        if metadata.get(key, value) != value:
            raise UserError(
                f"data set {name!r}: its metadata say {key}={metadata.get(key)}, but {source} has "
                f"{value}: register it without {key}"
            )
    metadata.set(**facts)
    if metadata.get("keypoint_names") is None:
        metadata.set(**data.keypoints)
    DatasetCatalog.pop(name)
    DatasetCatalog.register(name, load)


def json_of_records(name: str) -> str:
    """Write the records of a data set as a COCO json in the cache; returns its path.

    Raises:
        UserError: the records or the metadata lack something.
    """
    whole = f"{name} as a COCO json"
    # Detectron2 shifts the keypoints of the records that it converts, in place.
    annotated = [
        {**record, "annotations": copy.deepcopy(record.get("annotations", []))}
        for record in DatasetCatalog.get(name)
    ]
    DatasetCatalog.register(whole, lambda: annotated)
    MetadataCatalog.get(whole).set(**MetadataCatalog.get(name).as_dict() | {"name": whole})
    try:
        data = convert_to_coco_dict(whole)
        data["info"].pop("date_created")  # equal records have one file
        text = json.dumps(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"data set {name!r} cannot be evaluated with COCO's metrics: "
            f"{type(error).__name__}: {error}; its metadata need thing_classes, its records "
            "image_id, width, height, and annotations with bbox, bbox_mode and category_id"
        ) from error
    finally:
        DatasetCatalog.remove(whole)
        MetadataCatalog.remove(whole)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = os.path.join(cache_folder(), f"records-{digest}.json")
    if not os.path.exists(path):
        write_text_atomic(path, text)
    return path


def _read_and_fix(
    json_file: str, image_root: str, all_sizes: bool
) -> tuple[dict[str, Any], list[Finding]]:
    data = _read(json_file)
    try:
        return data, CocoFixer(data, json_file, image_root, all_sizes).findings.list()
    except SizesDiffer:
        data = _read(json_file)
        return data, CocoFixer(data, json_file, image_root, all_sizes=True).findings.list()


def _read(path: str) -> dict[str, Any]:
    with PathManager.open(path, "rb") as file:
        content = file.read()
    try:
        data = json.loads(content)  # detects the encoding
    except ValueError as error:
        raise UserError(f"{path} is not a json, or not complete: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a COCO json: it contains a {type(data).__name__}")
    return data


def _read_cached(path: str, all_sizes: bool) -> tuple[dict[str, Any], list[Finding]] | None:
    if not os.path.exists(path):
        return None
    data = _read(path)
    facts = data.get(_FIXES, {})
    if facts.get("all_sizes", False) < all_sizes:
        return None
    return data, [Finding(**finding) for finding in facts["findings"]]


def _records(
    data: dict[str, Any], image_root: str, classes: dict[int, int]
) -> list[dict[str, Any]]:
    annotations = defaultdict(list)
    for annotation in data.get("annotations", ()):
        annotations[annotation["image_id"]].append(annotation)
    records = []
    for image in sorted(data["images"], key=lambda image: image["id"]):
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
        }
        if "annotations" in data:
            record["annotations"] = [_instance(a, classes) for a in annotations[image["id"]]]
        records.append(record)
    return records


def _instance(annotation: dict[str, Any], classes: dict[int, int]) -> dict[str, Any]:
    instance = {
        "iscrowd": annotation["iscrowd"],
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": classes[annotation["category_id"]],
    }
    if segmentation := annotation.get("segmentation"):
        rle = isinstance(segmentation, dict)
        instance["segmentation"] = compressed_rle(segmentation) if rle else segmentation
    if keypoints := annotation.get("keypoints"):  # pixel indices -> coordinates, as Detectron2
        instance["keypoints"] = [v + 0.5 if i % 3 < 2 else v for i, v in enumerate(keypoints)]
    return instance


def cache_folder() -> str:
    """``$XDG_CACHE_HOME/region_pretrain``, or the user's folder in the system's temp folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "region_pretrain")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    user = os.getuid() if hasattr(os, "getuid") else "user"  # Windows: a folder of the user's
    folder = os.path.join(tempfile.gettempdir(), f"region_pretrain-{user}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


def _cached_path(json_file: str, image_root: str) -> str:
    """Path of the fixed copy: changes with the json, the image folder and :data:`VERSION`."""
    stat = os.stat(PathManager.get_local_path(json_file))
    facts = (
        os.path.abspath(json_file),
        stat.st_mtime_ns,
        stat.st_size,
        os.path.abspath(image_root),
    )
    key = hashlib.sha256(repr((*facts, VERSION)).encode()).hexdigest()[:16]
    stem = os.path.splitext(os.path.basename(json_file))[0]
    return os.path.join(cache_folder(), f"{stem}-{key}.json")
