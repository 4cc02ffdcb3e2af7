"""Reads files that list the labelled images of a few-label split."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError


class Image(NamedTuple):
    """An image of a split; at least one of the two is known.

    Attributes:
        image_id: its id; compared as text.
        file_name: its path, or the end of it.
    """

    image_id: int | str | None
    file_name: str | None


class Split(NamedTuple):
    """The content of a split file.

    Attributes:
        path: the file.
        images: the listed images; empty if they are listed by position.
        positions: positions in the list of images that Detectron2 trains on.
        percent: percentage of the images that ``positions`` should contain.
    """

    path: str
    images: Sequence[Image] = ()
    positions: Sequence[int] = ()
    percent: float = 0.0


def read_split(
    path: str, fraction: float | None = None, seed: int | None = None, several: bool = True
) -> Split:
    """Read a split file.

    It contains one of:

    - a COCO json, such as ``instances_train2017.1@10.json`` of SoftTeacher, AlignDet and
      mmdetection: the images of its ``images``; its annotations are not used;
    - a JSON list of image ids or file names;
    - ``labelled_images.json`` of another run;
    - ``{percent: {seed: list}}`` or ``{percent: list}``; integers in these lists are positions in
      the list of images with annotations, as in Unbiased Teacher's ``COCO_supervision.txt``.

    Args:
        path: a local file or a PathManager URL.
        fraction, seed: select one of several lists in the file.
        several: refuse them for a file of a single list.

    Raises:
        UserError: the file is none of these, is empty, or has no list for the fraction and seed.
    """
    if not PathManager.isfile(path):
        raise UserError(f"no such split file: {path}")
    try:
        with PathManager.open(path, "rb") as file:
            content = json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    by_percent = isinstance(content, dict) and content and all(map(_is_number, content))
    if by_percent:
        percent, content = _entry(path, content, "fraction", fraction, 100)
        if isinstance(content, dict):
            _, content = _entry(path, content, "seed", seed, 1)
    elif several and (fraction is not None or seed is not None):
        raise UserError(
            f"{path} is a single split: remove fraction={fraction} and seed={seed}, or write "
            "{percent} and {seed} in its name"
        )
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        content = content["images"]
    elif isinstance(content, dict) and "image_ids" in content and "file_names" in content:
        ids, names = content["image_ids"], content["file_names"]
        if not isinstance(ids, list) or not isinstance(names, list) or len(ids) != len(names):
            raise UserError(f"{path}: image_ids and file_names are not two lists of one length")
        content = [{"id": i, "file_name": n} for i, n in zip(ids, names, strict=True)]
    if not isinstance(content, list) or not content:
        raise UserError(
            f"{path} lists no images: expected a COCO json, a list of image ids or file names, "
            "or {percent: {seed: list}}"
        )
    if by_percent and all(type(entry) is int for entry in content):
        return Split(path, positions=content, percent=percent)
    return Split(path, [_image(path, entry) for entry in content])


def find_images(split: Split, records: Sequence[dict[str, Any]], where: str) -> list[int]:
    """The indices of a split's images, in ascending order.

    An image with an id and a file name matches the record with this id if the file names agree as
    well: ids alone would also match those of another data set. Otherwise it matches the record with
    its file name.

    Args:
        split: the split.
        records: Detectron2 dataset dicts.
        where: names of the data sets, for messages.

    Raises:
        UserError: images are not among the records, or match several of them; or the number of
            positions does not fit the number of records.
    """
    if split.positions:
        return _check_positions(split, len(records), where)
    by_id: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        by_id[str(record.get("image_id"))].append(i)
    paths = [_slashes(str(record.get("file_name", ""))) for record in records]
    by_suffix: dict[int, dict[str, list[int]]] = {}

    def ending_with(name: str) -> list[int]:
        depth = name.count("/")
        if depth not in by_suffix:
            by_suffix[depth] = defaultdict(list)
            for i, path in enumerate(paths):
                by_suffix[depth][_suffix(path, depth)].append(i)
        return by_suffix[depth].get(name, [])

    found, missing = set(), []
    for image in split.images:
        matches = by_id.get(str(image.image_id), []) if image.image_id is not None else []
        if image.file_name is not None:
            name = _slashes(image.file_name)
            if image.image_id != image.file_name:
                matches = [i for i in matches if _suffix(paths[i], 0) == _suffix(name, 0)]
            if len(matches) != 1:
                matches = ending_with(name) or matches
        if len(matches) > 1:
            raise UserError(
                f"{split.path}: {_shown(image)} matches {len(matches)} images of {where}, e.g. "
                f"{paths[matches[0]]} and {paths[matches[1]]}: list longer file names"
            )
        if matches:
            found.add(matches[0])
        else:
            missing.append(_shown(image))
    if missing:
        raise UserError(
            f"{split.path}: {len(missing)} of {len(split.images)} images are not in {where}, e.g. "
            f"{', '.join(missing[:3])}: use the data set that the split was made from"
        )
    return sorted(found)


def short_names(paths: Sequence[str]) -> list[str]:
    """The ends of paths, with as few folders as make them all different."""
    paths = [_slashes(path) for path in paths]
    different = len(set(paths))
    for depth in range(max((path.count("/") for path in paths), default=0) + 1):
        names = [_suffix(path, depth) for path in paths]
        if len(set(names)) == different:
            return names
    return paths


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _entry(
    path: str, content: dict[str, Any], key: str, value: float | None, factor: int
) -> tuple[float, Any]:
    """The entry whose key is a number close to ``factor * value``, after its key."""
    for text, entry in content.items():
        if value is not None and abs(float(text) - factor * value) < 1e-6:
            return float(text), entry
    known = ", ".join(f"{float(text) / factor:g}" for text in content)
    problem = f"{key} is not set" if value is None else f"there is no {key}={value}"
    raise UserError(f"{path}: {problem}; it has {key} {known}")


def _image(path: str, entry: Any) -> Image:
    if isinstance(entry, dict) and entry.keys() & {"id", "file_name"}:
        return Image(entry.get("id"), entry.get("file_name"))
    if type(entry) is int:
        return Image(entry, None)
    if isinstance(entry, str):
        return Image(entry, entry)
    raise UserError(f"{path}: {entry!r} is not an image id or a file name")


def _check_positions(split: Split, total: int, where: str) -> list[int]:
    positions = sorted(set(split.positions))
    expected = int(split.percent / 100.0 * total)  # Unbiased Teacher's own check
    if positions[0] < 0 or positions[-1] >= total or len(positions) != expected:
        raise UserError(
            f"{split.path} lists {len(positions)} positions up to {positions[-1]} for "
            f"{split.percent:g} %, but {split.percent:g} % of the {total} images of {where} are "
            f"{expected}: it was made for another data set or another filter_empty"
        )
    return positions


def _slashes(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")


def _suffix(path: str, depth: int) -> str:
    """The file's name and up to ``depth`` folders."""
    return "/".join(path.split("/")[-depth - 1 :])


def _shown(image: Image) -> str:
    if image.file_name is None or image.file_name == image.image_id:
        return repr(image.image_id if image.file_name is None else image.file_name)
    return f"{image.file_name} (id {image.image_id})"
