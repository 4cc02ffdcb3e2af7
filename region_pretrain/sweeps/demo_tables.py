"""The demo's numbers as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from region_pretrain.reporting.summary import shown

Table = tuple[str, list[str], list[list[Any]]]

_DETECTION = {
    "bbox/AP": "box AP",
    "bbox/AP50": "box AP50",
    "segm/AP": "mask AP",
    "segm/AP50": "mask AP50",
}
_FEATURES = {"knn/fpn": "FPN features", "knn/head": "after the box head"}
_ROWS = {"scratch": "from scratch", "pretrained": "pre-trained", "difference": "difference"}


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Title, header and rows of each table.

    Args:
        results: of :func:`region_pretrain.sweeps.demo.run_demo`.
    """
    summary, seeds = results["summary"], results["seeds"]
    over = f", mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else ""
    rates = {start: f"{lr:g}" for start, lr in results["learning_rates"].items()}
    detection = [
        [label, rates.get(start, ""), *(shown(summary[m][start]) for m in _DETECTION)]
        for start, label in _ROWS.items()
    ]
    names = {**_ROWS, "scratch": "random"}
    features = {m: label for m, label in _FEATURES.items() if m in summary}
    knn = [[label, *(shown(summary[m][start]) for m in features)] for start, label in names.items()]
    minutes = [[name, f"{value:.1f}"] for name, value in results["minutes"].items()]
    minutes.append(["all", f"{sum(results['minutes'].values()):.1f}"])
    return [
        (
            f"Fine-tuned on few labels, evaluated on Shapes val, %{over}",
            ["start", "lr", *_DETECTION.values()],
            detection,
        ),
        (
            f"kNN accuracy of frozen region features on ground-truth boxes, %{over}",
            ["network", *features.values()],
            knn,
        ),
        ("Minutes", ["step", "min"], minutes),
    ]
