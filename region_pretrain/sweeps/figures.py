"""The figures of a sweep: AP of all runs, or against labels, images seen or minutes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from region_pretrain.reporting.plots import Curve, plot_curves, plot_points
from region_pretrain.sweeps.intervals import Seeds
from region_pretrain.sweeps.rows import FINAL, METRICS, Row, by_labels

_KEYS = ("bbox/AP", "segm/AP")


@dataclass(frozen=True)
class Figure:
    """A diagram with its caption.

    Attributes:
        name: for its file, without extension.
        caption: what it shows.
        png: 960 x 600 pixels.
    """

    name: str
    caption: str
    png: bytes


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The figures that the rows allow.

    AP against labels if there are several label counts, against images seen and, where known,
    minutes of pre-training if there are several lengths, and without those the AP of all runs, if
    they have several seeds.
    """
    return [*_against_labels(rows), *(_against_lengths(rows) or _all_runs(rows))]


def _all_runs(rows: Sequence[Row]) -> list[Figure]:
    """Box and mask AP of every fine-tuning, one figure per way to fine-tune with several seeds."""
    found = []
    for title, text, mine in _ways([row for row in rows if row.checkpoint == FINAL]):
        for key in _KEYS:
            groups = {row.label: _by_pretraining(row.values(key)) for row in mine}
            groups = {label: lines for label, lines in groups.items() if lines}
            if max((sum(map(len, lines)) for lines in groups.values()), default=0) > 1:
                name = METRICS[key]
                png = plot_points(groups, f"{name} (%)")
                caption = f"{name} of every fine-tuning{text}, a line of points per pre-training"
                caption = f"{caption}; the ticks are the means"
                found.append(Figure(_file("runs", title, name), caption, png))
    return found


def _by_pretraining(values: Mapping[Seeds, float | None]) -> list[list[float | None]]:
    """One list per pre-training; none if all values are undefined."""
    if not set(values.values()) - {None}:
        return []
    found = _grouped(values, lambda seeds: seeds[0])
    return [[values[seeds] for seeds in mine] for mine in found.values()]


def _ways(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Rows by fine-tuning and label fraction: end of a file's name, end of a caption, rows."""
    groups = _grouped(rows, lambda row: (row.finetune, row.label_fraction))
    names = {name for name, _ in groups}
    found = []
    for (name, fraction), mine in groups.items():
        title = text = ""
        if len(names) > 1:
            title, text = f"_{name}", f", {name}"
        if len(groups) > len(names):
            title, text = f"{title}_{fraction:g}", f"{text}, {100 * fraction:g} % of the labels"
        found.append((title, text, mine))
    return found


def _file(kind: str, title: str, metric: str) -> str:
    return f"{kind}{title}_{metric.lower().replace(' ', '_')}"


def _against_labels(rows: Sequence[Row]) -> list[Figure]:
    """One figure per group of :func:`~region_pretrain.sweeps.rows.by_labels`."""
    found, groups = [], by_labels(rows)
    for name, mine in groups.items():
        curves = _grouped(mine, lambda row: row.label)
        title, text = (f"_{name}", f", {name}") if len(groups) > 1 else ("", "")
        axis = "labelled images"
        found += _draw("labels", title, text, curves, axis, lambda row: row.labels)
    return found


def _against_lengths(rows: Sequence[Row]) -> list[Figure]:
    """Two figures per fine-tuning and label fraction; baselines are horizontal lines."""
    found = []
    for title, text, mine in _ways(rows):
        trained = [row for row in mine if row.images_seen]
        if len({row.images_seen for row in trained}) < 2:
            continue
        curves = _grouped(trained, lambda row: row.method)
        flat = {row.label: row for row in mine if row.images_seen == 0}
        axis = "images seen in pre-training"
        found += _draw("images", title, text, curves, axis, lambda row: row.images_seen, flat)
        if all(row.cost.minutes and row.checkpoint == FINAL for row in trained):
            axis = "minutes of pre-training"
            found += _draw("minutes", title, text, curves, axis, lambda row: row.cost.minutes, flat)
    return found


def _grouped(items, key) -> dict:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _draw(kind, title, text, groups, axis, x, flat=None) -> list[Figure]:
    """A figure of box AP and one of mask AP.

    Args:
        kind: start of the files' names.
        title: goes on after it.
        text: goes on after the captions' start.
        groups: name of a curve -> its rows.
        axis: label of the x axis.
        x: maps a row to its place on the axis.
        flat: name -> row to draw as a horizontal line.
    """
    found = []
    seen = sorted(x(row) for rows in groups.values() for row in rows)
    for key in _KEYS:
        curves: dict[str, Curve] = {}
        errors: dict[str, list[float]] = {}
        for name, row in (flat or {}).items():
            if (value := row.statistics(key))["mean"] is not None:
                curves[name] = [seen[0], seen[-1]], [value["mean"]] * 2
                errors[name] = [math.nan if value["std"] is None else value["std"]] * 2
        for name, rows in groups.items():
            points = sorted(
                (x(row), value["mean"], math.nan if value["std"] is None else value["std"])
                for row in rows
                if (value := row.statistics(key))["mean"] is not None
            )
            curves[name] = [], []
            if points:
                places, means, errors[name] = map(list, zip(*points, strict=True))
                curves[name] = places, means
        if any(places for places, _ in curves.values()):
            png = plot_curves(curves, axis, f"{METRICS[key]} (%)", errors=errors, log_x=True)
            name = METRICS[key]
            caption = f"{name} against {axis}{text}: mean ± standard deviation of several runs"
            found.append(Figure(_file(kind, title, name), caption, png))
    return found
