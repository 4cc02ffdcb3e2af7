"""Images and labels as arguments: folders, json files, names of data sets, lists of records."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from omegaconf import DictConfig

from region_pretrain.data.catalog import get_records
from region_pretrain.dataset_names import folder_name, is_path_name
from region_pretrain.errors import UserError

#: What names images, or images and labels.
#:
#: - a folder, for images without labels;
#: - ``(json, folder)``: a COCO json and the folder of its images;
#: - the name of a data set, e.g. ``"voc://ROOT?split=train"`` or a registered one, or several;
#: - a list of Detectron2's dataset dicts;
#: - a lazy call that returns a name.
Data = Any


class DataSets:
    """Turns arguments into names for a config.

    Attributes:
        given: the data sets that were passed as records: name -> (records, class names). Their
            names are registered by :func:`region_pretrain.api.session.isolated`.
    """

    def __init__(self) -> None:
        self.given: dict[str, tuple[Sequence[dict], Sequence[str]]] = {}

    def name(self, argument: str, data: Data, classes: Sequence[str] | None = None) -> Any:
        """The value of ``names`` in a config.

        Args:
            argument: name of the argument, for error messages.
            data: see :data:`Data`.
            classes: class names of records; None if their labels are not used.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(data, os.PathLike):
            data = os.fspath(data)
        if isinstance(data, str):
            return _named(argument, data)
        if isinstance(data, DictConfig) and "_target_" in data:
            return data
        items = list(data) if isinstance(data, Sequence) else []
        if isinstance(data, tuple) and len(items) == 2 and str(items[1]).endswith(".json"):
            raise UserError(f"{argument}={data}: the json comes first, then the folder")
        if isinstance(data, tuple) and len(items) == 2 and str(items[0]).endswith(".json"):
            return _coco(argument, *map(str, items))
        if items and all(isinstance(item, dict) for item in items):
            return self._records(argument, items, classes)
        if items and all(isinstance(item, str | os.PathLike) for item in items):
            return [_named(argument, os.fspath(item)) for item in items]
        raise UserError(
            f"{argument}={str(data)[:60]}: must be a folder, (json, folder), one or several names "
            "of data sets, or a list of Detectron2 dicts"
        )

    def _records(self, argument: str, records: list[dict], classes: Sequence[str] | None) -> str:
        labelled = classes is not None and any("annotations" in record for record in records)
        if labelled and not classes:
            raise UserError(f"{argument}: records with annotations need classes=[...], their names")
        if argument not in ("val", "data"):  # the key of an image's regions
            records = [{"image_id": r.get("file_name"), **r} for r in records]
        for i, record in enumerate(records):
            _check_record(f"{argument}[{i}]", record, classes if labelled else None)
        facts = (records, list(classes or ()))
        # The same for equal records in another process, e.g. in order to resume.
        text = json.dumps(_plain(facts))
        name = f"records-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        self.given[name] = facts
        return name


def _check_record(where: str, record: dict, classes: Sequence[str] | None) -> None:
    """Check what Detectron2 would not: of its labels only if there are ``classes``."""
    for key in ("file_name", "image_id") if classes is None else ("image_id",):
        if record.get(key) is None:
            raise UserError(f"{where}: a record needs {key!r}, as Detectron2's dataset dicts")
    for i, annotation in enumerate((classes and record.get("annotations")) or ()):
        if "bbox" in annotation and "bbox_mode" not in annotation:
            raise UserError(f"{where}: annotation {i} needs 'bbox_mode', as in Detectron2")
        class_id = annotation.get("category_id")
        if class_id not in range(len(classes)):
            raise UserError(
                f"{where}: annotation {i} of {record.get('file_name', record['image_id'])} has "
                f"category_id={class_id!r}, but the ids of {len(classes)} classes are 0 to "
                f"{len(classes) - 1}, in the order of classes=: number them so, as "
                "load_coco_json(json, folder, name) does if it is given a name"
            )


def _plain(value: Any) -> Any:
    """The same for equal values, also after they were written as JSON."""
    if isinstance(value, dict):
        return sorted(([str(k), _plain(v)] for k, v in value.items()), key=lambda item: item[0])
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, str | int | float | None) else repr(value)


def _named(argument: str, name: str) -> str:
    if is_path_name(name):
        return name
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return folder_name(os.path.abspath(path))
    if name in DatasetCatalog:
        return name
    if name.endswith(".json") and os.path.isfile(path):
        raise UserError(f"{argument}={name!r}: give (json, folder), the folder of its images too")
    if os.path.isfile(path) or "*" in name or name.startswith((".", "/", "~")) or name[-1:] == "/":
        raise UserError(
            f"{argument}={name!r}: there is no such folder; for single images, pass records: "
            "[{'file_name': PATH}, ...]"
        )
    return name


def _coco(argument: str, json_file: str, images: str) -> str:
    for path in (json_file, images):
        if not os.path.exists(os.path.expanduser(path)):
            raise UserError(f"{argument}: there is no {path}")
    # The same escapes as in a folder's name.
    path, folder = (folder_name(p).removeprefix("folder://") for p in (json_file, images))
    return f"coco://{path}?images={folder}"


def records_of(names: Any, annotations: bool = False) -> list[dict]:
    """The images of ``names`` in a config."""
    return get_records(instantiate(names), annotations)
