"""Labelled images from a COCO json."""

from __future__ import annotations

from typing import Any, NamedTuple

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from region_pretrain.data.folder import local_folder
from region_pretrain.errors import UserError


class CocoData(NamedTuple):
    """A COCO json in Detectron2's form.

    Attributes:
        records: Detectron2 dataset dicts.
        classes: names of the classes.
        category_ids: the json's ids, in the order of ``classes``.
        findings: what was mended.
        json_file: a file that pycocotools accepts.
    """

    records: list[dict[str, Any]]
    classes: list[str]
    category_ids: list[int]
    findings: list[Any]
    json_file: str


def load_coco(json_file: str, image_root: str) -> CocoData:
    """Load the images and annotations of a COCO json.

    Raises:
        UserError: a missing file or folder, or a json in another format.
    """
    if not PathManager.isfile(json_file):
        raise UserError(f"no such file: {json_file}, the COCO json of the images in {image_root}")
    folder = local_folder(image_root)
    name = f"json of coco {json_file}"
    try:
        records = load_coco_json(json_file, folder, name)
        metadata = MetadataCatalog.get(name)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{json_file} is not a COCO json of boxes: {type(error).__name__}: {error}"
        ) from error
    finally:
        MetadataCatalog.pop(name, None)
    ids = list(metadata.thing_dataset_id_to_contiguous_id)
    return CocoData(records, metadata.thing_classes, ids, [], json_file)
