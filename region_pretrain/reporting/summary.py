"""Several numbers as one, and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tabulate import tabulate


def mean_std(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation.

    Args:
        values: one per seed; None if a seed has none.

    Returns:
        ``mean`` and ``std``. Both are None if a value is None or there are no values; ``std`` is
        None for a single value.
    """
    if None in values or not len(values):
        return {"mean": None, "std": None}
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def shown(value: Mapping[str, float | None]) -> str:
    """``12.3``, or ``12.3 ± 0.4`` over several seeds, or a dash.

    Args:
        value: result of :func:`mean_std`.
    """
    if value["mean"] is None:
        return "–"
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:.1f}{spread}"


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def text_table(
    rows: Sequence[Sequence[str]], headers: Sequence[str], left: int = 1, style: str = "simple"
) -> str:
    """Text as a table.

    Args:
        rows, headers: its cells.
        left: number of columns that are aligned left; the others are numbers.
        style: ``simple``, or ``github`` for Markdown.
    """
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=align)
