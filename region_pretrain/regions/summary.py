"""Counts, recall and precision of a data set's regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

#: The IoU thresholds of a summary's recall.
RECALL_IOUS = (0.5, 0.7)
#: The IoU threshold of its precision.
PRECISION_IOU = 0.5


class Hits(NamedTuple):
    """How well the regions of one or several annotated images fit their objects.

    Attributes:
        objects: number of annotated objects.
        found: number of those that some region covers, per threshold of :data:`RECALL_IOUS`.
        judged: number of regions in images with objects.
        precise: number of those that cover an object with :data:`PRECISION_IOU`.
    """

    objects: int = 0
    found: tuple[int, ...] = (0,) * len(RECALL_IOUS)
    judged: int = 0
    precise: int = 0

    def __add__(self, other: Hits) -> Hits:
        found = tuple(a + b for a, b in zip(self.found, other.found, strict=True))
        return Hits(
            self.objects + other.objects,
            found,
            self.judged + other.judged,
            self.precise + other.precise,
        )

    @property
    def recall(self) -> tuple[float, ...]:
        """Fraction of the objects that are found, per threshold; NaN without objects."""
        return tuple(n / self.objects if self.objects else float("nan") for n in self.found)

    @property
    def precision(self) -> float:
        """Fraction of the judged regions that cover an object; NaN without such regions."""
        return self.precise / self.judged if self.judged else float("nan")


def count_hits(boxes: np.ndarray, objects: np.ndarray) -> Hits:
    """Compare the regions of an image with its annotated objects.

    An image without objects may be one that nobody annotated, so its regions are not judged.

    Args:
        boxes: ``(N, 4)`` XYXY.
        objects: ``(M, 4)`` XYXY.
    """
    if not len(objects):
        return Hits()
    if not len(boxes):
        return Hits(objects=len(objects))
    ious = box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(objects).double())
    best = ious.amax(dim=0)
    found = tuple(int((best >= iou).sum()) for iou in RECALL_IOUS)
    precise = int((ious.amax(dim=1) >= PRECISION_IOU).sum())
    return Hits(len(objects), found, len(boxes), precise)


def summarise(parts: Sequence[Mapping[str, Any]], counts: np.ndarray) -> dict[str, Any]:
    """Summarise the regions of a data set.

    Args:
        parts: the manifests of all parts; see :meth:`region_pretrain.regions.parts.Parts.write`.
        counts: ``(N,)`` number of boxes of each readable image.
    """
    unreadable = sum(len(part["unreadable"]) for part in parts)
    summary = {"images": len(counts), "unreadable": unreadable, "boxes": int(counts.sum())}
    if len(counts):
        summary |= {
            "mean": float(counts.mean()),
            "median": float(np.median(counts)),
            "min": int(counts.min()),
            "max": int(counts.max()),
            "without": int((counts == 0).sum()),
            "seconds_per_image": sum(part["seconds"] for part in parts) / len(counts),
        }
    counts = {key: sum(part[key] for part in parts) for key in ("given", "dropped", "clipped")}
    if counts["dropped"] or counts["clipped"]:
        summary |= counts
    hits = sum((hits_of(part) for part in parts), Hits())
    if hits.objects:
        summary["objects"] = hits.objects
        for iou, recall in zip(RECALL_IOUS, hits.recall, strict=True):
            summary[f"recall@{iou:g}"] = recall
        if hits.judged:
            summary["judged"] = hits.judged
            summary[f"precision@{PRECISION_IOU:g}"] = hits.precision
    return summary


def as_part(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`summarise` reads from a part, for a finished store with this summary."""
    objects, judged = summary.get("objects", 0), summary.get("judged", 0)
    found = [round(objects * summary.get(f"recall@{iou:g}", 0.0)) for iou in RECALL_IOUS]
    precise = round(judged * summary.get(f"precision@{PRECISION_IOU:g}", 0.0))
    return {
        "unreadable": [],
        "given": summary.get("given", summary["boxes"]),
        "dropped": summary.get("dropped", 0),
        "clipped": summary.get("clipped", 0),
        "seconds": summary.get("seconds_per_image", 0.0) * summary["images"],
        "hits": [objects, found, judged, precise],
    }


def hits_of(part: Mapping[str, Any]) -> Hits:
    """The hits in the manifest of a part."""
    objects, found, judged, precise = part["hits"]
    return Hits(objects, tuple(found), judged, precise)


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format a summary as a few lines of text."""
    lines = ["images: {images}, and {unreadable} unreadable files skipped".format(**summary)]
    if "mean" in summary:
        lines.append(
            "boxes:  {boxes}; per image: mean {mean:.1f}, median {median:g}, min {min}, max {max}; "
            "{without} images without boxes".format(**summary)
        )
        lines.append("time:   {seconds_per_image:.3f} s per image and process".format(**summary))
    if "given" in summary:
        lines.append(
            "given:  {given} boxes; {dropped} are not finite or outside their image, {clipped} "
            "were clipped to it".format(**summary)
        )
    if "objects" in summary:
        recalls = ", ".join(f"{summary[f'recall@{i:g}']:.3f} at IoU {i:g}" for i in RECALL_IOUS)
        lines.append(f"recall: {recalls}, of {summary['objects']} annotated objects")
    if "judged" in summary:
        precision = summary[f"precision@{PRECISION_IOU:g}"]
        lines.append(
            f"precision: {precision:.3f} of the boxes have an IoU of {PRECISION_IOU:g} or more "
            "with an annotated object"
        )
    return "\n".join(lines)
