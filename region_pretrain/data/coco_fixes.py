"""What labelling tools get wrong in COCO jsons: fixed where the intent is clear, refused otherwise.

pycocotools and Detectron2 accept the fixed json; training and evaluation see the same boxes.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from typing import NoReturn

from region_pretrain.data.coco_annotations import AnnotationFixer
from region_pretrain.data.findings import Findings, id_key
from region_pretrain.errors import UserError
from region_pretrain.files import is_local
from region_pretrain.images import EncodedImage, UnreadableImage

#: Part of the key of cached results: raise it when the fixes change.
VERSION = 5
#: Image headers compared with the json's sizes, unless one of them differs: then all are.
SAMPLED_SIZES = 200
_HEAD_BYTES = 1 << 18
_LISTED_FOLDER = 1000  # files per folder from which listing it is faster than looking them up

TWO_TYPES = "image ids of two types; all are now of one"


class SizesDiffer(Exception):
    """One of the sampled sizes differs from its file, so all must be compared."""


def local_image(image: dict, image_root: str) -> str | None:
    """Path of an image's file; None if it is not on a mounted file system."""
    path = os.path.join(image_root, image["file_name"])
    return path if is_local(path) else None


def read_head(path: str, expected: tuple[int, int] | None = None) -> EncodedImage:
    """An image whose header is complete: only the start of the file if that is enough.

    Args:
        path: the image.
        expected: the upright size in the json; another one is confirmed with the complete file.

    Raises:
        UnreadableImage: the file is missing or not an image.
    """
    try:
        with open(path, "rb") as file:
            head = EncodedImage(file.read(_HEAD_BYTES), path)
        if head.size() == expected or head.header.format == "JPEG":
            return head
    except (OSError, UnreadableImage):
        pass  # a URL, or a header that is longer
    return EncodedImage.read(path)


def missing_files(images: Iterable[dict], image_root: str) -> list[str]:
    """Paths of local images that do not exist; large folders are listed once."""
    folders: dict[str, list[str]] = {}
    for image in images:
        if path := local_image(image, image_root):
            folder, name = os.path.split(path)
            folders.setdefault(folder, []).append(name)
    missing = []
    for folder, names in folders.items():
        listed: set[str] = set()
        if len(names) >= _LISTED_FOLDER and os.path.isdir(folder):
            listed.update(os.listdir(folder))
        # macOS and Windows find files by other spellings than the listed one.
        paths = (os.path.join(folder, name) for name in names if name not in listed)
        missing += [path for path in paths if not os.path.exists(path)]
    return missing


def fix_file_names(images: Iterable[dict], image_root: str, findings: Findings) -> None:
    """Fix names of files that do not exist, if a file of nearly the same name does.

    These are backslashes of Windows, and accents, which macOS writes as separate characters.
    """
    for image in images:
        name = image["file_name"]
        if "\\" not in name and name.isascii() or os.path.exists(os.path.join(image_root, name)):
            continue
        forward = name.replace("\\", "/")
        for form in (None, "NFC", "NFD"):
            same = unicodedata.normalize(form, forward) if form else forward
            if same != name and os.path.exists(os.path.join(image_root, same)):
                what = "backslash in a file name; replaced by /"
                if forward == name:
                    what = "file name in another Unicode form; replaced"
                findings.add(what, name)
                image["file_name"] = same
                break


def files_agree(images: list[dict], image_root: str) -> bool:
    """Whether the files of a fixed json exist, and a sample of them has its sizes."""
    if missing_files(images, image_root):
        return False
    for image in _sample(images):
        size = image["width"], image["height"]
        path = local_image(image, image_root)
        try:
            if path is not None and read_head(path, size).size() != size:
                return False
        except UnreadableImage:
            pass  # reported when it is read
    return True


def _sample(images: list[dict]) -> list[dict]:
    return images[:: -(-len(images) // SAMPLED_SIZES)]


class CocoFixer:
    """Fixes a COCO json in place.

    Args:
        data: the json's content.
        json_file: its path, for error messages.
        image_root: folder that its file names are relative to.
        all_sizes: compare every image's size with its file instead of a sample.

    Raises:
        UserError: something cannot be fixed.
        SizesDiffer: ``all_sizes`` is needed.
    """

    def __init__(self, data: dict, json_file: str, image_root: str, all_sizes: bool) -> None:
        self.findings = Findings()
        self._file, self._root, self._all_sizes = json_file, image_root, all_sizes
        if data.get("annotations", ()) is None:
            self.findings.add("`annotations` is null; removed", os.path.basename(json_file))
            del data["annotations"]
        labelled = "annotations" in data
        for key in ("images", "annotations", "categories"):
            if data.get(key) is None and not (labelled or key == "images"):
                continue
            if not isinstance(data.get(key), list) or not (data[key] or key == "annotations"):
                self._refuse(f"has no `{key}`: export it as a COCO detection json")
            if bad := [entry for entry in data[key] if not isinstance(entry, dict)]:
                self._refuse(f"has an entry of `{key}` that is not an object: {bad[0]!r}")
        self._turned: set = set()
        images = self._fix_images(data["images"])
        self._categories: dict[str, int] = {}  # key of an id -> id of its class
        if data.get("categories"):
            data["categories"] = self._fix_categories(data["categories"])
        if not labelled:
            return
        annotations = AnnotationFixer(
            json_file, images, self._categories, self.findings, self._compare_size, self._turned
        )
        data["annotations"] = annotations.fix(data["annotations"])
        if "info" not in data:  # several releases of pycocotools need it
            self.findings.add("no `info`; added", os.path.basename(json_file))
            data["info"] = {}
        data.setdefault("licenses", [])

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self._file} {problem}")

    def _fix_images(self, images: list[dict]) -> dict[str, dict]:
        """Returns the images by the key of their id."""
        by_key: dict[str, dict] = {}
        for index, image in enumerate(images):
            if not isinstance(image.get("file_name"), str) or not image["file_name"]:
                self._refuse(f"has no file_name in images[{index}]: add it")
            key = id_key(image.get("id"))
            if key is None:
                self._refuse(
                    f"has no usable id in images[{index}] ({image['file_name']}): "
                    "give each image an integer id of its own"
                )
            if key in by_key:
                both = f"{by_key[key]['file_name']} and {image['file_name']}"
                self._refuse(f"has two images with id {key} ({both}): renumber one of them")
            by_key[key] = image
        if len(types := {type(image["id"]) for image in images}) > 1 or types == {float}:
            integers = all(key.isdecimal() and str(int(key)) == key for key in by_key)
            for key, image in by_key.items():
                image_id = int(key) if integers else key
                if type(image["id"]) is not type(image_id):
                    self.findings.add(TWO_TYPES, f"{image['id']!r} of {image['file_name']}")
                image["id"] = image_id
        if missing := missing_files(images, self._root):
            fix_file_names(images, self._root, self.findings)
            missing = missing_files(images, self._root)
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(images)} images of {self._file} do not exist, e.g. "
                f"{missing[0]}: correct the image folder, or remove them from the json"
            )
        sampled = images if self._all_sizes else _sample(images)
        for image in images:
            if not (type(image.get("width")) is type(image.get("height")) is int) or not (
                image["width"] > 0 and image["height"] > 0
            ):
                self._fix_size(image)
        for image in sampled:
            self._compare_size(image)
        return by_key

    def _fix_size(self, image: dict) -> None:
        keys = id_key(image.get("width")), id_key(image.get("height"))
        if all(key is not None and key.isdecimal() and int(key) > 0 for key in keys):
            image["width"], image["height"] = map(int, keys)
            self.findings.add("width or height is not an integer; converted", image["file_name"])
            return
        try:
            path = os.path.join(self._root, image["file_name"])
            image["width"], image["height"] = read_head(path).size()
        except UnreadableImage as error:
            self._refuse(
                f"has no width and height for an image that cannot be read ({error}): "
                "repair the file, or remove the image from the json"
            )
        self.findings.add("no width or height; taken from the file", image["file_name"])

    def _compare_size(self, image: dict) -> None:
        """Compare an image's size with its file; readable files only."""
        path = local_image(image, self._root)
        if path is None:
            return
        given = image["width"], image["height"]
        try:
            width, height = read_head(path, given).size()
        except UnreadableImage:
            return  # reported when it is read
        if given == (width, height):
            return
        if not self._all_sizes:
            raise SizesDiffer
        if given != (height, width):
            self._refuse(
                f"gives {image['file_name']} (id {image['id']}) the size {given[0]}x{given[1]}, "
                f"but the file has {width}x{height}: label the images that you train on, or scale "
                "the boxes and correct width and height"
            )
        self.findings.add(
            "width and height swapped (EXIF orientation ignored); upright size used",
            image["file_name"],
        )
        image["width"], image["height"] = width, height
        self._turned.add(image["id"])

    def _fix_categories(self, categories: list[dict]) -> list[dict]:
        keys = [id_key(category.get("id")) for category in categories]
        for category, key in zip(categories, keys, strict=True):
            if key is None or not str(category.get("name", "")).strip():
                self._refuse(f"has a category without id or name: {category!r}")
        if any(type(category["id"]) is not int for category in categories):
            self.findings.add("category ids that are not integers; converted", keys[0])
        integers = all(re.fullmatch("0|-?[1-9][0-9]*", key) for key in keys)
        kept: dict[str, dict] = {}  # by name
        for number, (category, key) in enumerate(zip(categories, keys, strict=True), 1):
            name = category["name"] = str(category["name"])
            first = kept.get(name)
            if key in self._categories and (first is None or first["id"] != self._categories[key]):
                self._refuse(f"has two categories with id {key}: renumber {name!r}")
            if first is not None:
                self.findings.add("categories of one name; merged", name)
            else:
                first = kept[name] = {**category, "id": int(key) if integers else number}
            self._categories[key] = first["id"]
        return list(kept.values())
