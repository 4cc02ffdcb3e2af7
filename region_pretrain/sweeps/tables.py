"""The results of a sweep as tables of text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from region_pretrain.reporting.summary import shown
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.results import METRICS, Row, Statistics

#: Logged metrics of probes -> heading; others keep their names.
_PROBES = {
    "probe/knn_trunk": "kNN, trunk",
    "probe/knn_fpn": "kNN, FPN",
    "probe/knn_head": "kNN, box head",
}
_RESULTS = "Box and mask AP in percent, mean ± sample standard deviation over the n finished seeds."
_COST = (
    " Speed, peak memory per process and minutes (of the steps only) are those of the pre-training."
)
_PROBE_TEXT = (
    "Probes of the frozen features during pre-training: accuracy in percent, first → last value."
)
_TRIALS = (
    "Trials of learning rates: AP on a held-out split, with a seed that the results do not use. "
    "Each initialisation uses its best one."
)


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Attributes:
        caption: what it shows.
        header: names of the columns.
        rows: cells; the first columns name the row.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]


def varying(rows: Sequence[Row]) -> dict[str, str]:
    """Columns that distinguish rows of one initialisation: attribute -> heading."""
    names = {"finetune": "fine-tuning", "label_fraction": "labels", "checkpoint": "checkpoint"}
    return {k: v for k, v in names.items() if len({getattr(row, k) for row in rows}) > 1}


def row_name(row: Row, columns: Mapping[str, str]) -> list[str]:
    """The cells that name a row: its label, then the given :func:`varying` columns."""
    words = {"finetune": row.finetune, "label_fraction": f"{100 * row.label_fraction:g} %"}
    words["checkpoint"] = row.checkpoint if row.checkpoint == FINAL else f"{row.checkpoint:,}"
    return [row.label, *(words[key] for key in columns)]


def tables(
    rows: Sequence[Row],
    probes: Mapping[str, Mapping[str, tuple[Statistics, Statistics]]],
    brief: bool = False,
) -> list[Table]:
    """The tables of a sweep that are not empty: results, differences, probes, trials.

    Args:
        rows: from :func:`region_pretrain.sweeps.results.collect`.
        probes: label -> probes, from :func:`region_pretrain.sweeps.results.collect_probes`.
        brief: leave out AP75, the cost of pre-training and the trials.
    """
    found = [_results(rows, brief), _differences(rows, brief), _probes(probes)]
    return [table for table in [*found, *([] if brief else [_trials(rows)])] if table.rows]


def _metrics(brief: bool) -> dict[str, str]:
    return {key: name for key, name in METRICS.items() if not (brief and key.endswith("AP75"))}


def _results(rows: Sequence[Row], brief: bool) -> Table:
    columns, metrics = varying(rows), _metrics(brief)
    header = ["initialisation", *columns.values(), "n", "learning rate", *metrics.values()]
    header += [] if brief else ["img/s", "peak MiB", "min"]
    body = []
    for row in rows:
        cost = ((row.images_per_second, 0), (row.memory_mib, 0), (row.minutes, 1))
        body.append(
            [
                *row_name(row, columns),
                f"{row.seeds}" if row.seeds == row.wanted else f"{row.seeds}/{row.wanted}",
                row.learning_rate or "–",
                *(shown(row.metrics[key]) for key in metrics),
                *("–" if v is None else f"{v:.{d}f}" for v, d in ([] if brief else cost)),
            ]
        )
    return Table(_RESULTS + ("" if brief else _COST), header, body)


def _differences(rows: Sequence[Row], brief: bool) -> Table:
    """Paired differences to the first baseline."""
    compared = [row for row in rows if row.shared_seeds]
    columns, metrics = varying(rows), _metrics(brief)
    body = [
        [
            *row_name(row, columns),
            f"{row.shared_seeds}",
            *(shown(row.differences[key], sign=True) for key in metrics),
        ]
        for row in compared
    ]
    caption = (
        f"Difference to {compared[0].baseline if compared else ''}: mean ± sample standard "
        "deviation of the paired differences over the n shared seeds."
    )
    return Table(caption, ["initialisation", *columns.values(), "n", *metrics.values()], body)


def _probes(probes: Mapping[str, Mapping[str, tuple[Statistics, Statistics]]]) -> Table:
    logged = dict.fromkeys(key for values in probes.values() for key in values)
    keys = [key for key in _PROBES if key in logged] + [k for k in logged if k not in _PROBES]
    body = [
        [
            label,
            *(" → ".join(map(shown, values[key])) if key in values else "–" for key in keys),
        ]
        for label, values in probes.items()
    ]
    return Table(_PROBE_TEXT, ["pre-training", *(_PROBES.get(key, key) for key in keys)], body)


def _trials(rows: Sequence[Row]) -> Table:
    """The trials of learning rates, with the chosen one marked."""
    rates = sorted({rate for row in rows for rate in row.trials}, key=float)
    columns = varying(rows)

    def cell(row: Row, rate: str) -> str:
        value = row.trials.get(rate)
        text = "–" if value is None else f"{value:.1f}"
        return f"{text} (chosen)" if rate in row.trials and rate == row.learning_rate else text

    body = [[*row_name(row, columns), *(cell(row, rate) for rate in rates)] for row in rows]
    header = ["initialisation", *columns.values(), *(f"learning rate {rate}" for rate in rates)]
    return Table(_TRIALS, header, body if rates else [])


def results_csv(rows: Sequence[Row]) -> str:
    """The results with all digits; mean and standard deviation have separate columns."""
    names = ["label", "finetune", "label_fraction", "checkpoint", "seeds", "wanted"]
    names += ["learning_rate"]
    costs = ["images_per_second", "memory_mib", "minutes"]
    parts = [(key, what) for key in METRICS for what in ("mean", "std")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = [f"{key} {what}" for key, what in parts]
    header += [f"{key} difference {what}" for key, what in parts]
    writer.writerow(["initialisation", *names, *header, *costs])
    for row in rows:
        values = [row.metrics[key][what] for key, what in parts]
        values += [row.differences[key][what] if row.baseline else None for key, what in parts]
        costs_of_row = [getattr(row, name) for name in costs]
        writer.writerow([row.init, *(getattr(row, n) for n in names), *values, *costs_of_row])
    return buffer.getvalue()
