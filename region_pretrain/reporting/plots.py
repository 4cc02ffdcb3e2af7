"""Diagrams as PNG."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

#: A curve: x and y values of the same length.
Curve = tuple[Sequence[float], Sequence[float]]
Colour = tuple[float, float, float]
_COLOURS = colormaps["tab10"].colors
#: Start of the checksum that chooses a name's colour: with this one, the initialisations of each
#: figure of the benchmarks have colours of their own, and random weights are grey.
_START = 444_026
_TICKS = 10  # of a logarithmic axis at the values themselves
_LINE_STYLES = "-", "--", ":"  # of the first ten curves, the next ten, ...


def metric_curve(rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """One metric of a run by iteration; empty if the run has not logged it.

    Args:
        rows: lines of ``metrics.json``, from :func:`region_pretrain.metrics.read_metrics`.
        key: e.g. ``"total_loss"``, ``"bbox/AP"`` or ``"probe/knn_fpn"``.

    Returns:
        Numbers of finished iterations (1 after the first), and values.
    """
    # Detectron2 logs the final evaluation with the iteration after the last one.
    final = 1 + max((row["iteration"] for row in rows if "total_loss" in row), default=-2)
    rows = [row for row in rows if key in row]
    steps = [row["iteration"] + (row["iteration"] != final) for row in rows]
    return steps, [row[key] for row in rows]


def colours(names: Iterable[str]) -> dict[str, Colour]:
    """Colours by name, so that a name has the same one in every figure.

    The first ten names have ten colours, and so on: the name that comes later takes the next free
    one where two choose the same.

    Returns:
        name -> red, green and blue from 0 to 1.
    """
    chosen: dict[str, Colour] = {}
    free: list[Colour] = []
    for name in dict.fromkeys(names):
        free = free or list(_COLOURS)
        first = zlib.crc32(name.encode(), _START) % len(_COLOURS)
        chosen[name] = next(
            colour for colour in _COLOURS[first:] + _COLOURS[:first] if colour in free
        )
        free.remove(chosen[name])
    return chosen


def plot_curves(
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    log_x: bool = False,
) -> bytes:
    """Draw curves into one diagram, each with its colour of :func:`colours` and a legend entry.

    Args:
        curves: name -> curve; the legend marks empty ones as having no data.
        x_label: label of the x axis.
        y_label: label of the y axis.
        errors: name -> half the length of the error bar at each point; NaN: no bar.
        log_x: use a logarithmic x axis, with a tick at each x value unless there are many. Points
            are drawn slightly beside it, so that they do not cover each other.

    Returns:
        PNG, 960 x 600 pixels.
    """
    figure, axes = _axes()
    labels = [literal(name if len(x) else f"{name} (no data)") for name, (x, _) in curves.items()]
    colour = colours(curves)
    for i, (name, (x, y)) in enumerate(curves.items()):
        marker = "o" if len(x) <= 30 else None
        bars = (errors or {}).get(name)
        bars = None if bars is None or np.isnan(bars).all() else bars
        shift = 1.01 ** (i - (len(curves) - 1) / 2) if log_x else 1
        axes.errorbar(
            [value * shift for value in x],
            y,
            bars,
            label=labels[i],
            color=colour[name],
            linestyle=_LINE_STYLES[i // len(_COLOURS) % len(_LINE_STYLES)],
            marker=marker,
            markersize=4,
            capsize=3,
        )
    if log_x:
        ticks = sorted({value for x, _ in curves.values() for value in x})
        axes.set_xscale("log")
        if len(ticks) > _TICKS:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        else:
            axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if curves:
        columns = max(1, min(4, 110 // (max(map(len, labels)) + 8)))
        figure.legend(loc="outside upper center", ncols=columns)
    return _png(figure)


def plot_points(groups: Mapping[str, Sequence[Sequence[float | None]]], x_label: str) -> bytes:
    """Draw groups of values from top to bottom, with a tick at the mean of each.

    Args:
        groups: name -> lines of values, e.g. one line per pre-training, which are drawn below each
            other; None is not drawn, and such a group has no mean.
        x_label: label of the x axis.

    Returns:
        PNG, 960 x 600 pixels.
    """
    figure, axes = _axes()
    colour = colours(groups)
    for i, (name, lines) in enumerate(groups.items()):
        places = i + (np.arange(len(lines)) - (len(lines) - 1) / 2) * min(0.16, 0.7 / len(lines))
        for place, line in zip(places, lines, strict=True):
            values = [value for value in line if value is not None]
            axes.plot(
                values, [place] * len(values), "o", color=colour[name], markersize=5, alpha=0.7
            )
        if None not in (every := [value for line in lines for value in line]):
            axes.plot(np.mean(every), i, "|", color="black", markersize=26, markeredgewidth=1.5)
    axes.set_yticks(range(len(groups)), [literal(name) for name in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    return _png(figure)


def literal(text: str) -> str:
    """A text for matplotlib, which would read dollar signs as mathematics and hide ``_names``."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
