"""Counts and recall of a data set's regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

#: The IoU thresholds of a summary's recall.
RECALL_IOUS = (0.5, 0.7)


def count_found(boxes: np.ndarray, objects: np.ndarray, iou: float) -> int:
    """Number of objects that overlap with some box by at least this IoU.

    Args:
        boxes: ``(N, 4)`` XYXY.
        objects: ``(M, 4)`` XYXY.
        iou: the threshold.
    """
    if not len(boxes) or not len(objects):
        return 0
    ious = box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(objects).double())
    return int((ious.amax(dim=0) >= iou).sum())


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
    objects = sum(part["objects"] for part in parts)
    if objects:
        summary["objects"] = objects
        for i, iou in enumerate(RECALL_IOUS):
            summary[f"recall@{iou:g}"] = sum(part["found"][i] for part in parts) / objects
    return summary


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format a summary as a few lines of text."""
    lines = ["images: {images}, and {unreadable} unreadable files skipped".format(**summary)]
    if "mean" in summary:
        lines.append(
            "boxes:  {boxes}; per image: mean {mean:.1f}, median {median:g}, min {min}, max {max}; "
            "{without} images without boxes".format(**summary)
        )
        lines.append("time:   {seconds_per_image:.3f} s per image and process".format(**summary))
    if "objects" in summary:
        recalls = ", ".join(f"{summary[f'recall@{i:g}']:.3f} at IoU {i:g}" for i in RECALL_IOUS)
        lines.append(f"recall: {recalls}, of {summary['objects']} annotated objects")
    return "\n".join(lines)
