"""Assigns the boxes of another program to the images of a data set."""

from __future__ import annotations

import logging
import os
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog

from region_pretrain.dataset_names import is_path_name, parse
from region_pretrain.errors import UserError
from region_pretrain.regions.elsewhere.formats import Boxes

logger = logging.getLogger(__name__)

#: Key of a record: its :class:`Given` boxes, or the path of the file with them.
GIVEN = "given_regions"


class Given(NamedTuple):
    """The boxes of one image as another program wrote them.

    Attributes:
        boxes: ``(N, 4)`` float32 XYXY.
        scores: ``(N,)`` float32, or None.
        size: ``(width, height)`` of the image that they are for; None if unknown.
        source: the file, for error messages.
    """

    boxes: np.ndarray
    scores: np.ndarray | None
    size: tuple[int, int] | None
    source: str


def attach(records: Sequence[dict], boxes: Boxes) -> list[dict]:
    """Give each record its boxes under :data:`GIVEN`.

    Names of files match if they are equal, or if one path ends with the other; for a folder, the
    endings of the files do not count. How many images have no boxes, and how many names are of no
    image, is logged.

    Args:
        records: Detectron2 dicts of the data set.
        boxes: the boxes.

    Returns:
        Copies of the records; those of images without boxes lack the key.

    Raises:
        UserError: no image has boxes, or a name is that of several images.
    """
    table = boxes.table
    if table is not None and table.by_id:
        rows = {str(record["image_id"]): i for i, record in enumerate(records)}
        found = [rows.get(name, -1) for name in table.names]
    else:
        names = _Names(records, without_ending=table is None)
        found = [names.find(name, boxes.path) for name in (table.names if table else boxes.files)]
    out = [dict(record) for record in records]
    taken: dict[int, int] = {}
    for n, i in enumerate(found):
        if i < 0:
            continue
        if i in taken:
            both = [(table.names if table else boxes.files)[k] for k in (taken[i], n)]
            raise UserError(
                f"{boxes.path}: {both[0]} and {both[1]} are both {records[i]['file_name']}"
            )
        taken[i] = n
        out[i][GIVEN] = _given(boxes, n)
    _report(records, boxes, found, len(taken))
    return out


def _given(boxes: Boxes, n: int) -> Given | str:
    table = boxes.table
    if table is None:
        return os.path.join(boxes.path, boxes.files[n])
    part = slice(table.offsets[n], table.offsets[n + 1])
    scores = None if table.scores is None else table.scores[part]
    return Given(table.boxes[part], scores, table.sizes.get(table.names[n]), boxes.path)


def _report(records: Sequence[dict], boxes: Boxes, found: list[int], matched: int) -> None:
    names = boxes.table.names if boxes.table is not None else boxes.files
    strange = [name for name, i in zip(names, found, strict=True) if i < 0]
    if not matched:
        by_id = boxes.table is not None and boxes.table.by_id
        image = records[0]
        advice = "name the folder that they are relative to"
        if by_id:
            advice = (
                "name the COCO json that lists the images with --ids ANN.json, or as the data set "
                "coco://ANN.json?images=DIR"
            )
        kind = "image ids" if by_id else "file names"
        example = f", e.g. {names[0]}, are" if names else " are"
        shown = image["image_id"] if by_id else image["file_name"]
        raise UserError(
            f"{boxes.path} has boxes for none of the {len(records)} images: its {kind}{example} "
            f"not like {shown}; {advice}"
        )
    logger.info("%s (%s): boxes for %d of %d images", boxes.path, boxes.format, matched,
                len(records))  # fmt: skip
    if matched < len(records):
        given = set(found)
        without = [r["file_name"] for i, r in enumerate(records) if i not in given]
        logger.warning("%s has no boxes for %s", boxes.path, _some(without))
    if strange:
        logger.warning(
            "%s also has boxes for %s that the data set lacks", boxes.path, _some(strange)
        )


def _some(names: Sequence[Any]) -> str:
    return f"{len(names)} images (e.g. {', '.join(map(str, names[:3]))})"


class _Names:
    """Finds images by parts of their paths."""

    def __init__(self, records: Sequence[dict], without_ending: bool) -> None:
        self._without_ending = without_ending
        self._paths: list[tuple[str, str]] = []  # key and path of each image
        self._by_base: dict[str, list[int]] = defaultdict(list)
        for i, record in enumerate(records):
            path = self._clean(os.fspath(record["file_name"]))
            self._paths.append((self._clean(str(record["image_id"])), path))
            self._by_base[posixpath.basename(path)].append(i)

    def find(self, name: str, source: str) -> int:
        """The position of an image, or -1.

        Raises:
            UserError: several images have this name.
        """
        cleaned = self._clean(name)
        candidates = self._by_base.get(posixpath.basename(cleaned), [])
        for matches in (
            [i for i in candidates if cleaned in self._paths[i]],
            [i for i in candidates if self._paths[i][1].endswith(f"/{cleaned}")],
            [i for i in candidates if cleaned.endswith(f"/{self._paths[i][0]}")],
        ):
            if len(matches) > 1:
                both = " and ".join(self._paths[i][1] for i in matches[:2])
                raise UserError(
                    f"{source}: {name} could be {both}: write more of the path, or leave one out"
                )
            if matches:
                return matches[0]
        return -1

    def _clean(self, name: str) -> str:
        name = posixpath.normpath(name.replace("\\", "/"))
        return posixpath.splitext(name)[0] if self._without_ending else name


def refuse_annotations(path: str, names: Any) -> None:
    """Refuse a data set's own annotations as boxes of another program.

    Args:
        path: the file of boxes.
        names: one or several data sets, registered or named by path; others are not checked.

    Raises:
        UserError: it is the COCO json of one of them.
    """
    several = names if isinstance(names, Sequence) else []  # also of a config
    for name in [names] if isinstance(names, str) else several:
        annotations = None
        if is_path_name(name):
            source = parse(name)
            annotations = source.path if source.scheme == "coco" else None
        elif name in MetadataCatalog.list():
            annotations = MetadataCatalog.get(name).get("json_file")
        mine = os.path.realpath(os.path.expanduser(path))
        if annotations is not None and mine == os.path.realpath(annotations):
            raise UserError(
                f"{path} has the annotations of {name}, not boxes of another program: for "
                "annotated boxes as regions, give recipe ground_truth-v1 instead"
            )
