"""The rows of a sweep's results, and the CSV file with one line per fine-tuning."""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

from region_pretrain.errors import UserError
from region_pretrain.reporting.plots import Curve
from region_pretrain.reporting.summary import mean_std
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.intervals import Seeds

#: ``task/metric`` of ``results.json`` -> heading.
METRICS = {
    f"{task}/{metric}": f"{name} {metric}"
    for task, name in (("bbox", "box"), ("segm", "mask"))
    for metric in ("AP", "AP50", "AP75")
}
_METRIC_COLUMNS = {key: name.lower().replace(" ", "_") for key, name in METRICS.items()}

Statistics = dict[str, float | None]  # result of mean_std


@dataclass(frozen=True)
class Cost:
    """Cost of a pre-training; a value is None if it is not logged.

    Attributes:
        images_per_second: median.
        memory_mib: peak memory of a process.
        minutes: time of the steps only.
    """

    images_per_second: float | None = None
    memory_mib: float | None = None
    minutes: float | None = None


@dataclass
class Row:
    """One initialisation, fine-tuned in one way, over all seeds.

    Attributes:
        init: name of the initialisation in the sweep.
        label: its name in tables.
        method: its name in figures against the images seen, shared by pre-trainings of a method.
        finetune, label_fraction, checkpoint: how it is fine-tuned.
        labels: number of labelled images; None if unknown.
        images_seen: images seen in pre-training, including the pre-trainings that it continues; 0
            without pre-training; None if unknown.
        wanted: number of planned fine-tunings.
        learning_rate: the chosen or configured learning rate as text; None if not known yet.
        test_data: what names the test data in the config; None if unknown.
        trials: learning rate -> mean metric on the held-out split over its finished trials.
        by_seeds: seeds, and the machine of the fine-tuning if known -> key of :data:`METRICS` ->
            value, None if the detector found nothing; only finished fine-tunings.
        curves: key of :data:`METRICS` -> mean by iteration, at the points that all seeds have: of
            the finished fine-tunings, or while there are none, of those that have logged it.
        costs: seed -> cost of the finished pre-training.
    """

    init: str
    label: str
    method: str
    finetune: str
    label_fraction: float
    checkpoint: str | int
    labels: int | None = None
    images_seen: int | None = None
    wanted: int = 0
    learning_rate: str | None = None
    test_data: str | None = None
    trials: dict[str, float | None] = field(default_factory=dict)
    by_seeds: dict[Seeds, dict[str, float | None]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    costs: dict[int | None, Cost] = field(default_factory=dict)

    def values(self, key: str) -> dict[Seeds, float | None]:
        """The values of one metric."""
        return {seeds: values[key] for seeds, values in self.by_seeds.items()}

    def statistics(self, key: str) -> Statistics:
        """Mean and standard deviation of one metric over the finished fine-tunings."""
        return mean_std(list(self.values(key).values()))

    @property
    def pretrained(self) -> bool:
        """Whether the sweep pre-trains this initialisation, as far as finished runs tell."""
        return any(pretrain is not None for pretrain, *_ in self.by_seeds)

    @property
    def cost(self) -> Cost:
        """The mean cost over the pre-training's seeds; the memory is the maximum."""
        totals = {"memory_mib": max}
        found = {}
        for part in fields(Cost):
            values = [getattr(cost, part.name) for cost in self.costs.values()]
            if values and None not in values:
                found[part.name] = totals.get(part.name, statistics.fmean)(values)
        return Cost(**found)


def by_labels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that can be compared over several label counts, of the final checkpoints.

    Returns:
        Fine-tuning -> its rows, if it has several label counts. If each fine-tuning has its own
        single count, e.g. because they differ in length, and all are tested on the same data, they
        are one group, called ``""``.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.checkpoint == FINAL and row.labels is not None:
            groups.setdefault(row.finetune, []).append(row)
    counts = [{row.labels for row in mine} for mine in groups.values()]
    if all(len(found) == 1 for found in counts):
        joined = [row for mine in groups.values() for row in mine]
        distinct = len(set().union(*counts)) == len(groups)
        one_test = len({row.test_data for row in joined}) == 1
        groups = {"": joined} if distinct and one_test else {}
    return {name: mine for name, mine in groups.items() if len({r.labels for r in mine}) > 1}


_ROW = ("label", "method", "finetune", "labels", "label_fraction", "checkpoint")
_ROW += ("images_seen", "learning_rate", "test_data")
_OPTIONAL = {"test_data", "machine", "planned"}  # files of earlier versions do not have them
_COSTS = tuple(part.name for part in fields(Cost))
COLUMNS = ("sweep", "initialisation", "pretrain_seed", "finetune_seed", *_ROW)
COLUMNS += ("planned", "machine", *_METRIC_COLUMNS.values(), *_COSTS)


def results_csv(rows: Sequence[Row], sweep: str) -> str:
    """One line per finished fine-tuning, with all digits; an undefined value is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for (pretrain, finetune, *machine), values in row.by_seeds.items():
            writer.writerow(
                {
                    "sweep": sweep,
                    "initialisation": row.init,
                    "pretrain_seed": pretrain,
                    "finetune_seed": finetune,
                    **{name: getattr(row, name) for name in _ROW},
                    "planned": row.wanted,
                    "machine": "".join(machine),
                    **{name: values[key] for key, name in _METRIC_COLUMNS.items()},
                    **asdict(row.costs.get(pretrain, Cost())),
                }
            )
    return buffer.getvalue()


def read_csv(path: str) -> list[Row]:
    """The rows that :func:`results_csv` wrote, without trials and curves.

    Raises:
        UserError: there is no such file, it is not UTF-8 or no CSV, it lacks a column, a value is
            not a number, or lines that would be compared do not belong together.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no {path}: expected the results.csv of a sweep")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as CSV in UTF-8") from None
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing := [name for name in missing if name not in _OPTIONAL]:
            raise UserError(f"{path} has no column {missing[0]}: expected a sweep's results.csv")
        lines = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    rows: dict[tuple[str, ...], Row] = {}
    for number, line in enumerate(lines, 2):
        try:
            _add_line(rows, line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return list(rows.values())


def _add_line(rows: dict[tuple[str, ...], Row], line: dict[str, str]) -> None:
    if None in line.values() or None in line:
        raise ValueError("a line has not as many values as the first line has columns")
    if rows and line["sweep"] != (sweep := next(iter(rows))[0]):
        raise ValueError(
            f"sweep {line['sweep']}, but the lines before are of {sweep}: make tables of each "
            "alone, or give both one name if they share the protocol"
        )
    names = ("sweep", "initialisation", "finetune", "label_fraction", "checkpoint")
    key = tuple(line[name] for name in names)
    checkpoint = line["checkpoint"]
    new = Row(
        line["initialisation"],
        line["label"],
        line["method"],
        line["finetune"],
        float(line["label_fraction"]),
        FINAL if checkpoint == FINAL else int(checkpoint),
        _number(line["labels"], int),
        _number(line["images_seen"], int),
        learning_rate=line["learning_rate"] or None,
        test_data=line.get("test_data") or None,
    )
    row = rows.setdefault(key, new)
    for name in _ROW:
        if getattr(new, name) != getattr(row, name):
            raise ValueError(
                f"{name} {getattr(new, name)}, but {getattr(row, name)} in an earlier line of "
                f"{' '.join(key)}: they are averaged, so give one of them another initialisation"
            )
    pretrain = _number(line["pretrain_seed"], int)
    seeds = pretrain, int(line["finetune_seed"])
    # Baselines may be repeated on each machine that compares others with them.
    if machine := line.get("machine"):
        seeds += (machine,)
    if seeds in row.by_seeds or pretrain is not None and seeds[:2] in {s[:2] for s in row.by_seeds}:
        raise ValueError(f"a second line of {' '.join(key)} with seeds {seeds[:2]}")
    row.by_seeds[seeds] = {k: _number(line[name], float) for k, name in _METRIC_COLUMNS.items()}
    planned = _number(line.get("planned") or "", int) or 0
    row.wanted = max(row.wanted, planned, len(row.by_seeds))
    cost = Cost(*(_number(line[name], float) for name in _COSTS))
    if cost != Cost():
        row.costs[pretrain] = cost


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    if text and not math.isfinite(value := kind(text)):
        raise ValueError(f"{text} is not finite: leave the value of a detector without AP empty")
    return value if text else None
