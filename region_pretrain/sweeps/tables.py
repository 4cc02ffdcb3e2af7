"""The results of a sweep as tables of text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from region_pretrain.errors import UserError
from region_pretrain.reporting.summary import shown
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.intervals import difference, pair, pairs_of_two_machines
from region_pretrain.sweeps.rows import METRICS, Row, Statistics, by_labels

_AP = "bbox/AP", "segm/AP"
#: Logged metrics of probes -> heading; others keep their names.
_PROBES = {
    "probe/knn_trunk": "kNN, trunk",
    "probe/knn_fpn": "kNN, FPN",
    "probe/knn_head": "kNN, box head",
}
_RESULTS = "Box and mask AP in percent, mean ± sample standard deviation over n fine-tunings."
_COST = (
    " Speed, peak memory per process and minutes (of the steps only) are those of the pre-training."
)
_FOUND_NOTHING = " {}: no mean, as the detector of {} of {} fine-tunings found nothing."
_DIFFERENCES = (
    "Difference from {}: mean over n pairs of fine-tunings with equal seeds ± standard error [95 % "
    "interval]. Both cover the variance between the seeds of fine-tuning and, where there are "
    "several, of pre-training."
)
_TWO_MACHINES = (
    " With equal seeds, fine-tunings still differ between machines; pairs of two machines: {}."
)
_OTHER_TEST_DATA = " Tested on other data and not compared: {}."
_AGAINST_LABELS = "By number of labelled images: {}, mean ± sample standard deviation."
_WORTH = (
    "Labelled images that {} would need for the same {}, and their ratio: interpolated on a "
    "logarithmic scale between the label counts."
)
_PROBE_TEXT = (
    "Probes of the frozen features during pre-training: accuracy in percent, first → last value. "
    "On Shapes, the box head's predicts the AP after fine-tuning best, and the trunk's does not."
)
_TRIALS = (
    "Trials of learning rates: mean AP on a held-out split, with seeds that the results do not "
    "use. Each initialisation uses its best one."
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
    references: Sequence[str] = (),
    brief: bool = False,
) -> list[Table]:
    """The tables of a sweep that are not empty: results, differences, AP and worth by label count,
    probes, trials.

    Args:
        rows: all rows of the results.
        probes: label -> probes, from :func:`region_pretrain.sweeps.results.collect_probes`.
        references: initialisations to compare the others with, one table each; empty: the first
            one without pre-training.
        brief: leave out AP75, the cost of pre-training, the tables by label count and the trials.

    Raises:
        UserError: a reference is not an initialisation of the rows.
    """
    inits = list(dict.fromkeys(row.init for row in rows))
    for name in references:
        if name not in inits:
            raise UserError(f"no initialisation is called {name}: choose from {', '.join(inits)}")
    references = references or [r.init for r in rows if r.by_seeds and not r.pretrained][:1]
    found = [_results(rows, brief), *(_differences(rows, name, brief) for name in references)]
    found += [] if brief else [*_against_labels(rows), *_worth(rows, references)]
    found += [_probes(probes), *([] if brief else [_trials(rows)])]
    return [table for table in found if table.rows]


def _metrics(rows: Sequence[Row], brief: bool) -> dict[str, str]:
    """The metrics that a fine-tuning has: without masks there is no mask AP."""
    found = _measured(rows)
    shown = (key for key in METRICS if not (brief and key.endswith("AP75")))
    return {key: METRICS[key] for key in shown if key in found}


def _measured(rows: Sequence[Row]) -> set[str]:
    """The metrics that are defined for some run; all if there are none."""
    values = [found for row in rows for found in row.by_seeds.values()]
    return {key for key in METRICS if any(v[key] is not None for v in values)} or set(METRICS)


def _results(rows: Sequence[Row], brief: bool) -> Table:
    columns, metrics = varying(rows), _metrics(rows, brief)
    header = ["initialisation", *columns.values(), "n", "learning rate", *metrics.values()]
    header += [] if brief else ["img/s", "peak MiB", "min"]
    body = []
    for row in rows:
        done, cost = len(row.by_seeds), row.cost
        costs = ((cost.images_per_second, 0), (cost.memory_mib, 0), (cost.minutes, 1))
        body.append(
            [
                *row_name(row, columns),
                f"{done}" if done == row.wanted else f"{done}/{row.wanted}",
                row.learning_rate or "–",
                *(shown(row.statistics(key)) for key in metrics),
                *("–" if v is None else f"{v:.{d}f}" for v, d in ([] if brief else costs)),
            ]
        )
    caption = _RESULTS + ("" if brief else _COST)
    measured = _measured(rows)
    for row in rows:
        lost = sum(any(v[key] is None for key in measured) for v in row.by_seeds.values())
        if lost:
            name = " ".join(row_name(row, columns))
            caption += _FOUND_NOTHING.format(name, lost, len(row.by_seeds))
    return Table(caption, header, body)


def _differences(rows: Sequence[Row], reference: str, brief: bool) -> Table:
    """Paired differences from a reference's row of the same fine-tuning and label fraction."""
    columns, metrics = varying(rows), _metrics(rows, brief)
    bases = {(r.finetune, r.label_fraction, r.checkpoint): r for r in rows if r.init == reference}
    body, label = [], ""
    apart: dict[str, int] = {}
    elsewhere: list[str] = []
    for row in rows:
        how = row.finetune, row.label_fraction
        base = bases.get((*how, row.checkpoint), bases.get((*how, FINAL)))
        if base is None or row.init == reference:
            continue
        label = base.label
        data = {row.test_data, base.test_data} - {None}  # unknown in earlier files
        if row.by_seeds and base.by_seeds and len(data) > 1:
            elsewhere.append(row.label)
            continue
        if count := pairs_of_two_machines(row.by_seeds, base.by_seeds):
            apart[row.label] = apart.get(row.label, 0) + count
        pairs = {key: pair(row.values(key), base.values(key)) for key in metrics}
        if count := len(next(iter(pairs.values()))):
            found = [difference(values) for values in pairs.values()]
            wanted = max(row.wanted, base.wanted)
            missing = any(len(r.by_seeds) < r.wanted for r in (row, base))
            cells = ["–" if value is None else str(value) for value in found]
            n = f"{count}/{wanted}" if missing else f"{count}"
            body.append([*row_name(row, columns), n, *cells])
    header = ["initialisation", *columns.values(), "n", *metrics.values()]
    caption = _DIFFERENCES.format(label)
    if apart:
        caption += _TWO_MACHINES.format(", ".join(f"{n} of {of}" for of, n in apart.items()))
    if elsewhere:
        caption += _OTHER_TEST_DATA.format(", ".join(dict.fromkeys(elsewhere)))
    return Table(caption, header, body)


def _against_labels(rows: Sequence[Row]) -> list[Table]:
    """One line per initialisation and one column per label count, one table per metric."""
    found, groups = [], by_labels(rows)
    for name, mine in groups.items():
        counts = sorted({row.labels for row in mine})
        for key in _AP:
            cells = {(row.init, row.labels): _cell_of_labels(row, key) for row in mine}
            labels = {row.init: row.label for row in mine}
            body = [[v, *(cells.get((k, n), "–") for n in counts)] for k, v in labels.items()]
            caption = _AGAINST_LABELS.format(METRICS[key])
            caption = f"{name}: {caption}" if len(groups) > 1 else caption
            found.append(Table(caption, ["initialisation", *map(str, counts)], body))
    return found


def _cell_of_labels(row: Row, key: str) -> str:
    done = len(row.by_seeds)
    some = 0 < done < row.wanted
    return shown(row.statistics(key)) + (f" (n = {done}/{row.wanted})" if some else "")


def _worth(rows: Sequence[Row], references: Sequence[str]) -> list[Table]:
    """How many labels of a reference each initialisation is worth, one table per metric."""
    found, groups = [], by_labels(rows)
    for name, mine in groups.items():
        counts = sorted({row.labels for row in mine})
        for reference, key in itertools.product(references, _AP):
            means = {(row.init, row.labels): row.statistics(key)["mean"] for row in mine}
            curve = [(n, means.get((reference, n))) for n in counts]
            curve = [(n, mean) for n, mean in curve if mean is not None]
            labels = {row.init: row.label for row in mine}
            if len(curve) < 2:
                continue
            body = [
                [label, *(_worth_cell(n, means.get((init, n)), curve) for n in counts)]
                for init, label in labels.items()
                if init != reference
            ]
            caption = _WORTH.format(labels[reference], METRICS[key])
            caption = f"{name}: {caption}" if len(groups) > 1 else caption
            found.append(Table(caption, ["initialisation", *map(str, counts)], body))
    return found


def _worth_cell(count: int, ap: float | None, curve: Sequence[tuple[int, float]]) -> str:
    """``212 (2.1 x)``, or a bound outside of the curve: label counts and AP of the reference."""
    if ap is None:
        return "–"
    (least, lowest), (most, _) = curve[0], curve[-1]
    if ap < lowest:
        return f"< {least}"
    for (low, a), (high, b) in itertools.pairwise(curve):
        if b >= ap:  # the first crossing
            share = (ap - a) / (b - a) if b > a else 0.0
            labels = low * (high / low) ** share
            return f"{labels:.0f} ({labels / count:.1f} x)"
    return f"> {most} (> {most / count:.1f} x)"


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
