"""What a loader's batches are computed from, so that a run can notice that it has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contents:
    """The images of a loader, in their order, and their regions.

    Attributes:
        count: number of images.
        image: index -> (file name, everything else that a sample depends on, or None). Called in
            several threads.
        regions: content hash of the region store; "" without one.
    """

    count: int
    image: Callable[[int], tuple[str, Any]]
    regions: str = ""


def describe_record(record: Mapping[str, Any], index: int) -> tuple[str, Any]:
    """A Detectron2 record as :attr:`Contents.image` returns it; of annotations, boxes and classes.

    Args:
        record: Detectron2's dataset dict; one without ``file_name`` is named by its ``image_id``.
        index: its place in the data set.
    """
    name = str(record.get("file_name", record.get("image_id", index)))
    others = [record[key] for key in ("sem_seg_file_name", "crop", "reading") if key in record]
    if "annotations" in record:
        others += [
            (a.get("category_id"), a.get("iscrowd", 0), *map(float, a.get("bbox", ())))
            for a in record["annotations"]
        ]
    return name, others or None
