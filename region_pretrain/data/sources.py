"""Data sets named by path in Detectron2's catalogs.

``coco://ANN.json?images=DIR``, ``voc://ROOT?split=NAME`` and ``folder://DIR`` are registered under
these very names, so that Detectron2's functions accept them.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from region_pretrain import registration
from region_pretrain.data.coco_json import load_coco
from region_pretrain.data.findings import Finding
from region_pretrain.data.folder import IMAGE_EXTENSIONS, load_image_folder
from region_pretrain.dataset_names import Source, is_path_name, names_in, parse
from region_pretrain.errors import UserError

Records = list[dict[str, Any]]

_EVALUATOR_TYPES = {"coco": "coco", "voc": "pascal_voc"}


def register_named(cfg: DictConfig) -> None:
    """Register every data set that a config names, in this process.

    The code in ``train.register`` is executed, and every name by path in the config is registered.
    No labels are read yet.

    Args:
        cfg: complete.

    Raises:
        UserError: a name is invalid, or code in ``train.register`` fails.
    """
    registration.execute(cfg.train.register)
    for name in names_in(cfg):
        register(name)


def register(name: str) -> None:
    """Register a data set under its name by path, unless it is registered; see :func:`parse`.

    Other names are ignored. The metadata of ``coco://`` and ``voc://``, except for the type of
    their evaluator, is set when their records are first loaded; their files are read once per
    process.

    Raises:
        UserError: the name is invalid.
    """
    if not is_path_name(name) or name in DatasetCatalog:
        return
    source = parse(name)
    if source.scheme == "folder":
        DatasetCatalog.register(name, lambda: read_like(source, load_image_folder(source.path)))
        MetadataCatalog.get(name).set(image_root=source.path)
    else:
        DatasetCatalog.register(name, lambda: _load_labelled(name))
        MetadataCatalog.get(name).set(evaluator_type=_EVALUATOR_TYPES[source.scheme])


def read_like(source: Source, records: Records) -> Records:
    """Add a source's reading options to its records, if it has any."""
    if source.reading:
        for record in records:
            record["reading"] = {**source.reading}
    return records


def _load_labelled(name: str) -> Records:
    records, metadata, _ = _labelled(name)
    MetadataCatalog.get(name).set(**metadata)
    return pickle.loads(records)


@functools.cache
def _labelled(name: str) -> tuple[bytes, dict[str, Any], list[Finding]]:
    """Records, metadata, and what was found in the json.

    The records are pickled: this needs less memory, and each caller unpickles its own copy.
    """
    source = parse(name)
    load = {"coco": _load_coco, "voc": _load_voc}[source.scheme]
    records, *others = load(source)
    return pickle.dumps(read_like(source, records)), *others


def forget_labels() -> None:
    """Read labels again from now on, as a notebook's user may have edited them."""
    for read in (_labelled, _voc_classes, parse_rec):
        read.cache_clear()


def findings_of(name: str) -> list[Finding]:
    """What was found in the json of a ``coco://`` name, which is loaded unless it was before."""
    register(name)
    return _labelled(name)[2]


def _load_coco(source: Source) -> tuple[Records, dict[str, Any], list[Finding]]:
    data = load_coco(source.path, source.images)
    metadata = {
        "json_file": data.json_file,
        "image_root": source.images,
        "evaluator_type": _EVALUATOR_TYPES["coco"],
        "thing_classes": data.classes,
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(data.category_ids)},
        **data.keypoints,
    }
    return data.records, metadata, data.findings


def _load_voc(source: Source) -> tuple[Records, dict[str, Any], list[Finding]]:
    root = source.path
    listing = os.path.join(root, "ImageSets", "Main", f"{source.split}.txt")
    if not os.path.isfile(listing):
        raise UserError(f"no such file: {listing}, the list of the images of voc://{root}")
    try:
        classes = _voc_classes(root)
        records = _voc_records(root, listing, classes)
    except OSError as error:
        raise UserError(f"{root} lacks a file of {listing}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{root} cannot be read as Pascal VOC: {type(error).__name__}: {error}"
        ) from error
    metadata = {
        "dirname": root,
        "split": source.split,
        "image_root": os.path.join(root, "JPEGImages"),
        # PascalVOCDetectionEvaluator uses the 11-point metric for 2007.
        "year": 2007 if "2007" in os.path.basename(os.path.abspath(root)) else 2012,
        "evaluator_type": _EVALUATOR_TYPES["voc"],
        "thing_classes": classes,
    }
    return records, metadata, []


def _voc_records(root: str, listing: str, classes: list[str]) -> Records:
    """The records of ``load_voc_instances``, also of names with spaces and of other endings."""
    with open(listing, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    images = functools.cache(_images_by_stem)  # for this call: files may come and go
    records = []
    for number, name in enumerate(lines, 1):
        path = os.path.join(root, "Annotations", f"{name}.xml")
        if re.search(r"\s(-1|0|1)$", name) and not os.path.exists(path):
            raise UserError(
                f"{listing}: line {number} ({name!r}) has a second column, as VOC's lists of one "
                "class have: keep only the names of the images, one per line"
            )
        if not name:
            continue
        tree = ET.parse(path)
        records.append(
            {
                "file_name": _voc_image(root, name, tree, images),
                "image_id": name,
                "height": int(tree.find("./size/height").text),
                "width": int(tree.find("./size/width").text),
                "annotations": [_voc_object(box, classes) for box in tree.findall("object")],
            }
        )
    return records


def _voc_object(node: ET.Element, classes: list[str]) -> dict[str, Any]:
    corners = [float(node.find(f"bndbox/{key}").text) for key in ("xmin", "ymin", "xmax", "ymax")]
    return {
        "category_id": classes.index(node.find("name").text),
        # 1-based and inclusive: a box of the whole image is (1, 1, width, height)
        "bbox": [corners[0] - 1, corners[1] - 1, *corners[2:]],
        "bbox_mode": BoxMode.XYXY_ABS,
    }


def _voc_image(root: str, name: str, tree: ET.ElementTree, images: Callable) -> str:
    """NAME.jpg, or an image of another ending, or the one that the XML names."""
    path = os.path.join(root, "JPEGImages", f"{name}.jpg")
    if os.path.exists(path):
        return path
    folder, stem = os.path.split(path.removesuffix(".jpg"))
    given = re.split(r"[/\\]", tree.findtext("filename") or "")[-1]
    found = images(folder).get(stem, [])
    if given in found or not found and given in images(folder).get(os.path.splitext(given)[0], []):
        found = [given]
    return os.path.join(folder, found[0]) if found else path


def _images_by_stem(folder: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        stem, ending = os.path.splitext(file)
        if ending.lower() in IMAGE_EXTENSIONS:
            found.setdefault(stem, []).append(file)
    return found


@functools.cache
def _voc_classes(root: str) -> list[str]:
    """All names of all splits, sorted.

    In a folder called VOC2007 or VOC2012, they are VOC's 20, even if a subset of the files lacks
    some. Elsewhere, a class without boxes would make VOC's AP undefined.
    """
    folder = os.path.join(root, "Annotations")
    found: set[str] = set()
    for file in sorted(os.listdir(folder)):
        if file.endswith(".xml") and not file.startswith("."):  # ._NAME.xml in archives of macOS
            try:
                tree = ET.parse(os.path.join(folder, file))
            except ET.ParseError as error:
                raise UserError(f"{os.path.join(folder, file)} is damaged: {error}") from error
            found.update(box.findtext("name") or "" for box in tree.iter("object"))
    published = os.path.basename(os.path.abspath(root)) in ("VOC2007", "VOC2012")
    return list(CLASS_NAMES) if published and found <= set(CLASS_NAMES) else sorted(found)


def check_voc_files(name: str, training: bool) -> None:
    """Refuse files that VOC's metric cannot read; the XML that is read is kept for the evaluation.

    Args:
        name: a data set with the metadata of VOC, or its name by path.
        training: refuse classes without an object as well, whose AP is undefined, unless the
            classes are VOC's own.

    Raises:
        UserError: see above.
    """
    if is_path_name(name):
        DatasetCatalog.get(name)  # sets its metadata
    metadata = MetadataCatalog.get(name)
    listing = os.path.join(metadata.dirname, "ImageSets", "Main", f"{metadata.split}.txt")
    with PathManager.open(listing, "rb") as file:
        images = [line.strip() for line in file.read().decode().splitlines()]
    if images[:1] and images[0].startswith("\ufeff"):
        raise UserError(
            f"{listing} begins with a byte order mark, which VOC's metric takes for a part of a "
            "name: save it as UTF-8 without one"
        )
    if "" in images:
        raise UserError(
            f"{listing}: line {images.index('') + 1} is empty, and VOC's metric reads it as the "
            "name of an image: remove it"
        )
    if spaces := [image for image in images if " " in image]:
        raise UserError(
            f"{listing}: VOC's metric cannot read {spaces[0]!r}, because of its space: rename the "
            "image, or use COCOEvaluator"
        )
    if slashes := [c for c in metadata.thing_classes if "/" in c or os.sep in c]:
        raise UserError(
            f"{metadata.dirname}: VOC's metric writes a file per class, so {slashes[0]!r} is no "
            "name for one: rename it, or use COCOEvaluator"
        )
    judged: set[str] = set()
    for image in images:
        path = os.path.join(metadata.dirname, "Annotations", f"{image}.xml")
        try:
            judged.update(box["name"] for box in parse_rec(path) if not box["difficult"])
        except Exception as error:  # a missing file or key, text that is no number, damaged XML
            raise UserError(
                f"{path} cannot be evaluated with VOC's metric ({type(error).__name__}: {error}): "
                "each object needs name, pose, truncated and difficult, and whole numbers as "
                "corners; complete the file, or use COCOEvaluator"
            ) from error
    absent = [c for c in metadata.thing_classes if c not in judged]
    if training and absent and not set(metadata.thing_classes) <= set(CLASS_NAMES):
        raise UserError(
            f"{listing} has no image of {', '.join(absent)}, or only difficult ones, so VOC's AP "
            "is undefined: add some, or use COCOEvaluator, which averages over the other classes"
        )
