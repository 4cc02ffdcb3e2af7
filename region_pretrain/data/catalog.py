"""Unlabelled images as ordinary Detectron2 data sets, and plain folders without registration.

A record is a Detectron2 dict with at least ``file_name`` and ``image_id``; ``str(image_id)`` is the
image's key in a region store. No disk is read before the records of a data set are loaded.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from region_pretrain import registration
from region_pretrain.data.coco_fixes import fix_file_names
from region_pretrain.data.findings import Findings, id_key
from region_pretrain.data.folder import load_image_folder, local_folder
from region_pretrain.data.sources import read_like, register
from region_pretrain.dataset_names import FORMS, folder_name, is_path_name, parse
from region_pretrain.errors import UserError, did_you_mean
from region_pretrain.images.headers import read_header
from region_pretrain.images.pillow import open_with_pillow

logger = logging.getLogger(__name__)

_MAY_HAVE_16_BITS = (".png", ".tif", ".tiff")
_EXAMINED_HEADS, _EXAMINED_FILES = 500, 8
_PNG_BYTES = 33  # up to the end of its first chunk, which states the bits
_examined: set[str] = set()


def get_records(
    names: str | Sequence[str],
    annotations: bool = True,
    boxes: bool = False,
    unique: bool = True,
) -> list[dict]:
    """The images of one or several data sets, concatenated, in a fixed order.

    Args:
        names: registered names, or names by path: ``folder://DIR`` for all images in a folder and
            its subfolders, ``coco://ANN.json?images=DIR``, ``voc://ROOT?split=NAME``.
        annotations: whether labels are needed. Without them, ``coco://`` needs only the images'
            ids and file names in its json.
        boxes: without ``annotations``, add the boxes that the json of ``coco://`` may have; those
            that are malformed are left out.
        unique: refuse images with the same ``image_id``, which is the key of an image's regions;
            False where nothing is looked up by it.

    Returns:
        Detectron2 dataset dicts.

    Raises:
        UserError: an unknown name, a data set that is missing or has no images; or, with
            ``unique``, two images with the same ``image_id``.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError(f"no data set is given: name a registered one or {FORMS['folder']}")
    records: list[dict] = []
    origin: dict[str, str] = {}  # key -> data set
    for name in names:
        found = _get_one(name, annotations, boxes)
        for record in found:
            if "file_name" not in record or "image_id" not in record:
                raise UserError(f"data set {name!r} has a record without file_name or image_id")
            key = str(record["image_id"])
            if unique and key in origin:
                if origin[key] == name:
                    where, mend = f"{name!r} twice", "give each its own image_id"
                else:
                    where = f"{origin[key]!r} and {name!r}"
                    mend = "move the folders into one folder and name that"
                raise UserError(
                    f"image {key!r} is in {where}, but this key of its regions must be unique: "
                    f"leave one out, or {mend}"
                )
            origin[key] = name
        logger.info("%s: %d images", name, len(found))
        found = [
            r if isinstance(r["file_name"], str) else {**r, "file_name": os.fspath(r["file_name"])}
            for r in found
        ]
        warn_of_few_bits(name, found)
        records += found
    return records


def warn_of_few_bits(name: str, records: Sequence[dict]) -> None:
    """Warn of 16-bit images with values of a 12-bit camera, which would be nearly black.

    Args:
        name: the data set; each is examined once.
        records: its records.
    """
    if name in _examined:
        return
    _examined.add(name)
    some = [r for r in records if str(r["file_name"]).lower().endswith(_MAY_HAVE_16_BITS)]
    some = [str(record["file_name"]) for record in some if "bits" not in record.get("reading", {})]
    some = some[:: max(1, -(-len(some) // _EXAMINED_HEADS))]
    some = [file for file in some if _may_have_16_bits(file)]
    highest: dict[int, str] = {}
    for file in some[:: max(1, -(-len(some) // _EXAMINED_FILES))]:
        try:
            with open_with_pillow(Path(file).read_bytes(), file) as image:
                if image.mode.startswith("I"):
                    highest[image.getextrema()[1]] = file
        except Exception:  # what cannot be read is reported where it is needed
            continue
    if highest and max(highest) < 1 << 15:
        logger.warning(
            "%s: 16-bit images such as %s have values up to %d of 65,535 only, and are read as "
            "nearly black: name them by path with as many bits as the camera has, e.g. "
            "folder://DIR?bits=12",
            *(name, highest[max(highest)], max(highest)),
        )


def _may_have_16_bits(file: str) -> bool:
    """Whether a PNG says so; always for a TIFF, which may say so anywhere."""
    try:
        with open(file, "rb") as stream:
            header = read_header(stream.read(_PNG_BYTES))
    except OSError:
        return False
    return header is None or header.bits == 16


def check_registered(name: str) -> None:
    """Register a name by path, and refuse any other that is not registered.

    Raises:
        UserError: the name is unknown; lists similar names.
    """
    register(name)
    if name not in DatasetCatalog.list():
        nowhere = ", and there is no such folder"
        hint = did_you_mean(name, DatasetCatalog.list(), 4, otherwise=nowhere)
        if os.path.isdir(os.path.expanduser(name)):
            hint = f"; for a folder, write {folder_name(name)}"
        elif name.endswith(".json"):
            hint = f"; for a COCO json, write {FORMS['coco']}"
        raise UserError(
            f"no data set is called {name!r}{hint} (one that your code registers needs that code "
            "in train.register)"
        )


def _get_one(name: str, annotations: bool, boxes: bool) -> list[dict]:
    check_registered(name)
    if is_path_name(name) and not annotations and (source := parse(name)).scheme == "coco":
        return read_like(source, load_coco_images(source.path, source.images, boxes))
    if not annotations and DatasetCatalog[name].__module__ == "detectron2.data.datasets.coco":
        metadata = MetadataCatalog.get(name)
        # Names are fixed with the files at hand; all others are Detectron2's to find or to miss.
        if os.path.isfile(metadata.json_file) and os.path.isdir(metadata.image_root):
            return load_coco_images(metadata.json_file, metadata.image_root, boxes)
    try:
        records = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(
            f"data set {name!r} cannot be read: {error}; the environment variable "
            "DETECTRON2_DATASETS names the folder of the built-in data sets"
        ) from error
    if not records:
        raise UserError(f"data set {name!r} has no images")
    return records


def register_image_folder(name: str, root: str, with_labels: bool = False) -> str:
    """Register all images in a folder and its subfolders; see :func:`load_image_folder`.

    Registering a name again with the same arguments has no effect.

    Args:
        name: the data set's name.
        root: the folder.
        with_labels: label the images by their first folder, as in ImageNet's
            ``<root>/<wnid>/*.JPEG``; see :func:`label_by_folder`.

    Returns:
        ``name``.

    Raises:
        UserError: the name is taken by another data set.
    """

    def load() -> list[dict]:
        records = load_image_folder(root)
        if with_labels:
            MetadataCatalog.get(name).set(thing_classes=label_by_folder(records))
        return records

    if register_once(name, load, image_root=root, with_labels=with_labels):
        MetadataCatalog.get(name).set(image_root=root)
    return name


def label_by_folder(records: list[dict]) -> list[str]:
    """Label images by the first folder of their ``image_id``, ``<class>/...``.

    Args:
        records: images of a folder; their ``category_id`` is set, the index of their class.

    Returns:
        The class names, sorted.

    Raises:
        UserError: an image is not in a class folder.
    """
    names = [_first_folder(record) for record in records]
    classes = sorted(set(names))
    ranks = {name: rank for rank, name in enumerate(classes)}
    for record, name in zip(records, names, strict=True):
        record["category_id"] = ranks[name]
    return classes


def _first_folder(record: dict) -> str:
    folder, slash, _ = record["image_id"].partition("/")
    if not slash:
        raise UserError(f"{record['file_name']} has no label: it is not in a class folder")
    return folder


def register_once(name: str, load: Callable[[], list[dict]], **source: object) -> bool:
    """Register a data set unless it is registered already.

    Args:
        name: the data set's name.
        load: loads its records.
        source: values that identify the data set.

    Returns:
        Whether it is newly registered.

    Raises:
        UserError: the name is taken by a data set of another source.
    """
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog.list():
        if metadata.get("registered_source") != source:
            raise UserError(f"the data set name {name!r} is taken; choose another")
        return False
    DatasetCatalog.register(name, load)
    metadata.set(registered_source=source)
    return True


def load_coco_images(json_file: str | None, image_root: str, boxes: bool = False) -> list[dict]:
    """The images of a data set in COCO's layout, sorted by id.

    Args:
        json_file: COCO json, of which only ``images`` is read; an image that it lists twice counts
            once. With None, the files of the folder are listed; the number at the end of a file
            name is the image's id.
        image_root: the images' folder.
        boxes: read the boxes of ``annotations`` too; see :func:`get_records`.

    Returns:
        Records with COCO's integer ``image_id``, and with ``height`` and ``width`` if the json has
        them.

    Raises:
        UserError: a missing folder or json, a json in another format, a file name without a number.
    """
    folder = local_folder(image_root)
    if json_file is None:
        records = load_image_folder(image_root)
        for record in records:
            stem = os.path.splitext(record["image_id"])[0]
            number = re.search(r"\d+$", stem)
            if number is None:
                raise UserError(
                    f"{record['file_name']}: its name does not end with COCO's image id; "
                    "give the json that lists the images"
                )
            record["image_id"] = int(number.group())
        return sorted(records, key=lambda record: record["image_id"])

    if not PathManager.isfile(json_file):
        raise UserError(f"no such file: {json_file}, the COCO json of the images in {image_root}")
    try:
        with PathManager.open(json_file, "rb") as file:
            data = json.loads(file.read())  # detects the encoding
        fix_file_names(data["images"], folder, Findings())
        records = [
            {
                "file_name": os.path.join(folder, image["file_name"]),
                "image_id": _whole(image["id"]),
                **{key: image[key] for key in ("height", "width") if image.get(key) is not None},
            }
            for image in data["images"]
        ]
        if boxes:
            _add_boxes(records, data.get("annotations") or [])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{json_file} is not a COCO json: {type(error).__name__} {error}"
        ) from error
    if not records:
        raise UserError(f"{json_file} lists no images")
    once = {(record["image_id"], record["file_name"]): record for record in records}
    return sorted(once.values(), key=_by_id)


def _whole(value: Any) -> Any:
    """1.0 as 1, as in labelled data, so that the keys of regions agree."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _add_boxes(records: list[dict], annotations: list[dict]) -> None:
    """Add annotated boxes to the records of their images."""
    by_id = {id_key(record["image_id"]): record for record in records}
    for annotation in annotations:
        try:
            box = [float(value) for value in annotation["bbox"]]
            record = by_id[id_key(annotation["image_id"])]
            crowd = int(annotation.get("iscrowd") or 0)
        except (LookupError, TypeError, ValueError, AttributeError):
            continue
        if len(box) == 4 and all(map(math.isfinite, box)):
            entry = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": crowd}
            record.setdefault("annotations", []).append(entry)


def _by_id(record: dict) -> tuple[bool, int | str]:
    """Order of images whose ids may be numbers and text."""
    return isinstance(record["image_id"], str), record["image_id"]


def _register_builtin(root: str) -> None:
    """Register data sets that Detectron2 lacks, under the same root."""
    for name, folder, listing in (
        ("coco_2017_train_images", "coco/train2017", "instances_train2017.json"),
        ("coco_2017_unlabeled_images", "coco/unlabeled2017", "image_info_unlabeled2017.json"),
    ):
        image_root = os.path.join(root, folder)
        json_file = os.path.join(root, "coco/annotations", listing)

        def load(json_file: str = json_file, image_root: str = image_root) -> list[dict]:
            exists = PathManager.isfile(json_file)
            return load_coco_images(json_file if exists else None, image_root)

        register_once(name, load, image_root=image_root, json_file=json_file)
        MetadataCatalog.get(name).set(image_root=image_root)
    imagenet = os.path.join(root, "imagenet/train")
    register_image_folder("imagenet_train", imagenet)
    register_image_folder("imagenet_train_labeled", imagenet, with_labels=True)


_before = set(DatasetCatalog)
_register_builtin(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
registration.library_names |= set(DatasetCatalog) - _before
