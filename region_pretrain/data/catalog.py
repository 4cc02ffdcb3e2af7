"""Images without labels as ordinary Detectron2 data sets, and plain folders without registering.

A record is Detectron2's dict with at least ``file_name`` and ``image_id``; ``str(image_id)`` is the
image's key in a region store. Nothing is read from a disk before a data set is asked for.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "folder://"
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def get_records(names: str | Sequence[str]) -> list[dict]:
    """The images of one or several data sets, one set after the other, each in a fixed order.

    Args:
        names: registered names, or ``folder://DIR`` for all the images in a folder and below it.

    Returns:
        Detectron2 dataset dicts; what their sets know of labels is left in them.

    Raises:
        UserError: an unknown name, a data set that is not where it should be or has no images, or
            two images with the same ``image_id``.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no data set is named: give a registered name or folder://DIR")
    records: list[dict] = []
    origin: dict[str, str] = {}  # key -> data set
    for name in names:
        found = _get_one(name)
        for record in found:
            if "file_name" not in record or "image_id" not in record:
                raise UserError(f"data set {name!r}: a record without file_name or image_id")
            key = str(record["image_id"])
            if key in origin:
                both = f"{origin[key]!r} and {name!r}" if origin[key] != name else f"{name!r} twice"
                raise UserError(
                    f"image {key!r} is in {both}: regions are kept by this key, so it must be "
                    "unique; leave one out, or put folders under one folder and name that"
                )
            origin[key] = name
        logger.info("%s: %d images", name, len(found))
        records += found
    return records


def check_registered(name: str) -> None:
    """Refuse a name that stands for no registered data set.

    Raises:
        UserError: with the names that are near it.
    """
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        if os.path.isdir(os.path.expanduser(name)):
            hint = f"; for the folder write {FOLDER_PREFIX}{name}"
        raise UserError(f"no data set is called {name!r}{hint}")


def _get_one(name: str) -> list[dict]:
    if name.startswith(FOLDER_PREFIX):
        return load_image_folder(name[len(FOLDER_PREFIX) :])
    check_registered(name)
    try:
        records = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(
            f"data set {name!r} cannot be read: {error}; built-in sets lie in the folder that the "
            "environment variable DETECTRON2_DATASETS names"
        ) from error
    if not records:
        raise UserError(f"data set {name!r} has no images")
    return records


def register_image_folder(name: str, root: str) -> str:
    """Register all the images in a folder and below it; see :func:`load_image_folder`.

    Registering a name again with the same folder does nothing.

    Returns:
        ``name``.

    Raises:
        UserError: the name stands for another data set.
    """
    return _register(name, lambda: load_image_folder(root), image_root=root)


def register_imagenet(name: str, root: str, with_labels: bool = False) -> str:
    """Register a split of ImageNet, ``<root>/<wnid>/*.JPEG``.

    Args:
        name: the data set's name.
        root: the split's folder, e.g. ``imagenet/train``.
        with_labels: keep the class, the rank of the folder's name, as ``category_id``.

    Returns:
        ``name``.

    Raises:
        UserError: the name stands for another data set.
    """

    def load() -> list[dict]:
        records = load_image_folder(root)
        if with_labels:
            MetadataCatalog.get(name).set(thing_classes=label_by_folder(records))
        return records

    return _register(name, load, image_root=root, with_labels=with_labels)


def label_by_folder(records: list[dict]) -> list[str]:
    """Label images by the first folder of their ``image_id``, ``<class>/...``.

    Args:
        records: of image folders; each is given its ``category_id``, the rank of its class.

    Returns:
        The classes, in the order of their names.

    Raises:
        UserError: an image lies in no folder.
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
        raise UserError(f"{record['file_name']} lies in no class's folder: it has no label")
    return folder


def register_coco_unlabeled(name: str, json_file: str | None, image_root: str) -> str:
    """Register the images of a data set in COCO's layout, its annotations left aside.

    Args:
        name: the data set's name.
        json_file: COCO json, with annotations or without; None to list the folder.
        image_root: the images' folder.

    Returns:
        ``name``.

    Raises:
        UserError: the name stands for another data set.
    """
    return _register(
        name,
        lambda: load_coco_images(json_file, image_root),
        image_root=image_root,
        json_file=json_file,
    )


def _register(name: str, load: Callable[[], list[dict]], **source: object) -> str:
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog.list():
        if metadata.get("unlabeled_source") != source:
            raise UserError(f"the data set name {name!r} is taken; choose another")
        return name
    DatasetCatalog.register(name, load)
    metadata.set(unlabeled_source=source, image_root=source["image_root"])
    return name


def load_image_folder(root: str) -> list[dict]:
    """All the images in a folder and below it, known by their extension, sorted by path.

    Hidden files and folders are left out; links to folders are followed.

    Returns:
        Records whose ``image_id`` is the path relative to ``root`` with ``/`` between its parts.

    Raises:
        UserError: no such folder, no images, or a name that is not Unicode.
    """
    folder = _local_folder(root)
    try:
        paths = sorted(_walk(folder, "", ()))
    except OSError as error:
        raise UserError(f"the image folder {root} cannot be read: {error}") from error
    if not paths:
        raise UserError(f"the image folder {root} has no images ({' '.join(IMAGE_EXTENSIONS)})")
    try:
        "".join(paths).encode()
    except UnicodeEncodeError as error:
        bad = next(p for p in paths if any("\ud800" <= c <= "\udfff" for c in p))
        raise UserError(f"{folder}: the file name {bad!a} is not UTF-8; rename it") from error
    return [{"file_name": os.path.join(folder, path), "image_id": path} for path in paths]


def load_coco_images(json_file: str | None, image_root: str) -> list[dict]:
    """The images of a data set in COCO's layout, in the order of their ids.

    Args:
        json_file: COCO json, whose ``images`` are read and nothing else; None to take the files of
            the folder and the numbers that their names end with, which are COCO's own ids.
        image_root: the images' folder.

    Returns:
        Records with COCO's integer ``image_id``, and ``height`` and ``width`` where a json says.

    Raises:
        UserError: a missing folder or json, a json of another format, a file without a number.
    """
    folder = _local_folder(image_root)
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
        with PathManager.open(json_file) as file:
            images = json.load(file)["images"]
        records = [
            {
                "file_name": os.path.join(folder, image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
            }
            for image in images
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{json_file} is no COCO json: {type(error).__name__} {error}") from error
    if not records:
        raise UserError(f"{json_file} lists no images")
    return sorted(records, key=lambda record: record["image_id"])


def _local_folder(root: str) -> str:
    folder = PathManager.get_local_path(os.path.expanduser(root))
    if not os.path.isdir(folder):
        raise UserError(f"no such image folder: {root or repr(root)}")
    return folder


def _walk(folder: str, relative: str, above: tuple[str, ...]) -> Iterator[str]:
    """Relative paths of the images; ``above`` are the folders over this one, lest a link loop."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{relative}{name}/", (*above, real))
            elif name.lower().endswith(IMAGE_EXTENSIONS):
                yield relative + name


def _register_builtin(root: str) -> None:
    """What Detectron2's own registration leaves out, under the same root."""
    for name, folder, listing in (
        ("coco_2017_train_images", "coco/train2017", "instances_train2017.json"),
        ("coco_2017_unlabeled_images", "coco/unlabeled2017", "image_info_unlabeled2017.json"),
    ):
        image_root = os.path.join(root, folder)
        json_file = os.path.join(root, "coco/annotations", listing)

        def load(json_file: str = json_file, image_root: str = image_root) -> list[dict]:
            there = PathManager.isfile(json_file)
            return load_coco_images(json_file if there else None, image_root)

        _register(name, load, image_root=image_root, json_file=json_file)
    imagenet = os.path.join(root, "imagenet/train")
    register_imagenet("imagenet_train", imagenet)
    register_imagenet("imagenet_train_labeled", imagenet, with_labels=True)


_register_builtin(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
