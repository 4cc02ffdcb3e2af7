"""Annotated objects as images with one class each, for supervised pre-training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from region_pretrain.data.catalog import get_records
from region_pretrain.data.geometry import clip_boxes
from region_pretrain.errors import UserError

_MIN_SIDE = 8  # pixels; a crop of a smaller object is not recognisable


def object_crops(names: str | Sequence[str], context: float = 1.5) -> str:
    """Register the annotated objects of detection data sets as images.

    An object's image is its box with some context, clipped to the image. Crowds and objects below 8
    pixels are skipped. For use in a config::

        dataset.names = L(object_crops)(names="coco_2017_train")
        dataset.labels = True

    A record has the object's ``category_id`` and its ``crop`` in whole pixels of the file.

    Args:
        names: data sets with boxes, registered or named by path, all with the same classes.
        context: side lengths of the image relative to the box, at least 1.

    Returns:
        The registered name. Loading it raises ``UserError`` if no object is left, or if a data set
        has no image sizes.

    Raises:
        UserError: ``context`` is below 1.
    """
    names = [names] if isinstance(names, str) else list(names)
    if context < 1:
        raise UserError(f"object_crops: context={context} crops objects: must be at least 1")
    name = f"objects:{'+'.join(names)}:{context:g}"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: _load_crops(name, names, context))
    return name


def _load_crops(name: str, names: list[str], context: float) -> list[dict]:
    crops: list[dict] = []
    records = get_records(names)
    classes = MetadataCatalog.get(names[0]).get("thing_classes")
    if classes is not None:
        MetadataCatalog.get(name).set(thing_classes=list(classes))
    for record in records:
        objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
        if not objects:
            continue
        if "width" not in record or "height" not in record:
            raise UserError(f"object_crops: {record['file_name']} has no width and height")
        boxes = np.array(
            [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        )
        reading = {"reading": record["reading"]} if "reading" in record else {}
        center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        grown = np.concatenate([center - context * side / 2, center + context * side / 2], axis=1)
        grown = clip_boxes(np.rint(grown), record["width"], record["height"]).astype(int)
        for k, (annotation, crop) in enumerate(zip(objects, grown.tolist(), strict=True)):
            if min(crop[2] - crop[0], crop[3] - crop[1], *side[k]) >= _MIN_SIDE:
                crops.append(
                    {
                        "file_name": record["file_name"],
                        "image_id": f"{record['image_id']}#{k}",
                        "crop": crop,
                        "category_id": annotation["category_id"],
                        **reading,
                    }
                )
    if not crops:
        raise UserError(f"object_crops: no box in {', '.join(names)} has {_MIN_SIDE} pixels")
    return crops
