"""The report of a sweep: one page, a Markdown table and a CSV, also while it runs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from region_pretrain.files import write_text_atomic
from region_pretrain.reporting import html as report
from region_pretrain.reporting.environment import machine, versions
from region_pretrain.reporting.plots import plot_curves
from region_pretrain.reporting.summary import shown
from region_pretrain.sweeps import jobs, state
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.graph import PRETRAIN
from region_pretrain.sweeps.results import METRICS, Row, collect, logged
from region_pretrain.sweeps.state import SweepFile

HTML, MARKDOWN, CSV = "report.html", "report.md", "results.csv"

Table = tuple[list[str], list[list[Any]]]


def write_sweep_report(folder: str) -> list[str]:
    """Write the report of a sweep as it is now into its folder.

    Returns:
        The files: the page, the Markdown table, the CSV.

    Raises:
        UserError: the folder holds no sweep.
    """
    sweep = state.read_sweep(folder)
    now = jobs.states(sweep.plan, jobs.live_jobs(sweep.cluster, folder))
    rows = collect(sweep)
    paths = [os.path.join(folder, name) for name in (HTML, MARKDOWN, CSV)]
    report.write_report(paths[0], _sections(sweep, folder, now, rows), sweep.title, "84rem")
    write_text_atomic(paths[1], _markdown(sweep, now, rows))
    write_text_atomic(paths[2], _csv(rows))
    return paths


def results_text(folder: str) -> str:
    """The main table as plain text."""
    header, rows = results_table(collect(state.read_sweep(folder)))
    return tabulate(rows, header, disable_numparse=True)


def _summary(sweep: SweepFile, now: Mapping[str, str]) -> list[str]:
    facts = ", ".join(f"{name} {version}" for name, version in versions().items())
    here = machine()
    host = ", ".join([here["cpu"], f"{here['cores']} cores", *filter(None, [here.get("gpu")])])
    seen = f" Every pre-training sees {sweep.images_seen:,} images." if sweep.images_seen else ""
    return [
        f"{len(now)} runs: {state.counted(now)}.{_wall_time(sweep)}{seen}",
        f"Command: {sweep.command}",
        f"Report made on: {host}; {facts}.",
    ]


def _wall_time(sweep: SweepFile) -> str:
    """From the first start of a run to the last end so far."""
    attempts = [a for run in sweep.plan.runs.values() for a in state.attempts(run)]
    ends = [a["ended"] for a in attempts if a.get("ended")]
    if not ends:
        return ""
    minutes = (max(ends) - min(a["started"] for a in attempts)) / 60
    return f" {minutes:.1f} minutes from the first start to the last end."


def _varying(rows: Sequence[Row]) -> dict[str, str]:
    """Columns that tell rows of one start apart: attribute -> heading."""
    names = {"finetune": "fine-tuning", "label_fraction": "labels", "checkpoint": "checkpoint"}
    return {k: v for k, v in names.items() if len({getattr(row, k) for row in rows}) > 1}


def _row_name(row: Row, varying: Mapping[str, str]) -> list[str]:
    words = {"finetune": row.finetune, "label_fraction": f"{100 * row.label_fraction:g} %"}
    words["checkpoint"] = row.checkpoint if row.checkpoint == FINAL else f"{row.checkpoint:,}"
    return [row.label, *(words[key] for key in varying)]


def results_table(rows: Sequence[Row]) -> Table:
    """Header and rows of the main table."""
    varying = _varying(rows)
    header = ["start", *varying.values(), "n", "lr", *METRICS.values()]
    header += ["img/s", "peak MiB", "min"]
    body = []
    for row in rows:
        cost = [row.images_per_second, row.memory_mib, row.minutes]
        digits = (0, 0, 1)
        body.append(
            [
                *_row_name(row, varying),
                f"{row.seeds}" if row.seeds == row.wanted else f"{row.seeds}/{row.wanted}",
                row.rate or "–",
                *(shown(row.metrics[key]) for key in METRICS),
                *("–" if v is None else f"{v:.{d}f}" for v, d in zip(cost, digits, strict=True)),
            ]
        )
    return header, body


def rates_table(rows: Sequence[Row]) -> Table | None:
    """The trials of learning rates, the chosen one marked; None where there are none."""
    rates = sorted({rate for row in rows for rate in row.rates}, key=float)
    if not rates:
        return None
    varying = _varying(rows)

    def cell(row: Row, rate: str) -> str:
        if rate not in row.rates:
            return "–"
        value = row.rates[rate]
        text = "–" if value is None else f"{value:.1f}"
        return f"{text} (chosen)" if rate == row.rate else text

    body = [[*_row_name(row, varying), *(cell(row, rate) for rate in rates)] for row in rows]
    return ["start", *varying.values(), *(f"lr {rate}" for rate in rates)], body


_NOTES = (
    "Box and mask AP in percent, mean ± sample standard deviation over the n seeds that are "
    "finished. lr: the fine-tuning learning rate, for each start the best of the trials below. "
    "img/s, peak memory of a process and minutes of the steps are those of the pre-training."
)
_RATES = "Trials of learning rates: AP on scenes, and with a seed, that the results do not use."


def _sections(
    sweep: SweepFile, folder: str, now: Mapping[str, str], rows: list[Row]
) -> list[report.Section]:
    result = [report.text(text) for text in (*_summary(sweep, now), _NOTES)]
    result.append(report.table(*results_table(rows)))
    if (rates := rates_table(rows)) is not None:
        result += [report.text(_RATES), report.table(*rates)]
    sections = [report.Section("Results", result)]
    if failures := _failures(sweep, now):
        sections.append(report.Section("Failures", failures))
    sections.append(report.Section("AP by iteration of fine-tuning", _ap_curves(rows)))
    sections.append(report.Section("Pre-training", _loss_curves(sweep)))
    sections.append(report.Section("Runs", [_runs_table(sweep, folder, now)]))
    return [section for section in sections if section.blocks]


def _failures(sweep: SweepFile, now: Mapping[str, str]) -> list[str]:
    blocks = []
    runs = sweep.plan.runs
    failed = {name for name, word in now.items() if word == state.FAILED}
    blocked = state.blocked_by(sweep.plan, failed)
    for name in sorted(failed, key=list(runs).index):
        held = [runs[b].name for b, cause in blocked.items() if cause == name]
        waits = f" These cannot start without it: {', '.join(held)}." if held else ""
        blocks.append(report.text(f"{runs[name].name} failed.{waits} Its log ends:"))
        blocks.append(report.preformatted(state.failure(state.read_record(runs[name]))))
    return blocks


def _ap_curves(rows: Sequence[Row]) -> list[str]:
    """One diagram for each table and task, one curve a start."""
    lines = []
    for table in dict.fromkeys((row.finetune, row.label_fraction) for row in rows):
        mine = [row for row in rows if (row.finetune, row.label_fraction) == table]
        blocks = []
        for key in ("bbox/AP", "segm/AP"):
            names = {" ".join(_row_name(r, {"checkpoint": ""})[: _words(mine)]): r for r in mine}
            curves = {name: row.curves[key] for name, row in names.items() if row.curves[key][0]}
            if curves:
                what = f"{METRICS[key]}, {100 * table[1]:g} % of the labels, mean over the seeds"
                picture = plot_curves(curves, "fine-tuning iteration", f"{METRICS[key]} (%)")
                blocks.append(report.figure(picture, what))
        lines += _side_by_side(blocks)
    return lines


def _side_by_side(figures: Sequence[str]) -> list[str]:
    return [f'<div class="grid">{"".join(figures)}</div>'] if figures else []


def _words(rows: Sequence[Row]) -> int:
    return 2 if len({row.checkpoint for row in rows}) > 1 else 1


def _loss_curves(sweep: SweepFile) -> list[str]:
    """The losses mean different things: one diagram a method, one curve a seed."""
    blocks = []
    entries = [e for e in sweep.plan.entries if e["kind"] == PRETRAIN]
    for start in dict.fromkeys(e["init"] for e in entries):
        curves = {}
        for entry in (e for e in entries if e["init"] == start):
            rows = [r for r in logged(sweep.plan.runs[entry["run"]]) if "total_loss" in r]
            if rows:
                points = [r["iteration"] + 1 for r in rows], [r["total_loss"] for r in rows]
                curves[f"seed {entry['seed']}"] = points
        if curves:
            picture = plot_curves(curves, "iteration", "total loss")
            blocks.append(report.figure(picture, f"Pre-training loss of {sweep.labels[start]}"))
    return _side_by_side(blocks)


def _runs_table(sweep: SweepFile, folder: str, now: Mapping[str, str]) -> str:
    rows = []
    for run in sweep.plan.runs.values():
        at, path = state.progress(run), os.path.relpath(run.folder, folder)
        there = os.path.isdir(run.folder)
        record = state.read_record(run)
        log = record.logs[0] if record and record.logs else None
        rows.append(
            [
                report.Link(run.name, path) if there else run.name,
                now[run.id],
                f"{at.done}/{at.total}" if at else "",
                len(state.attempts(run)) or None,
                state.minutes(run) or None,
                report.Link("log", os.path.relpath(log, folder)) if log else "",
            ]
        )
    return report.table(["run", "state", "iteration", "attempts", "min", "log"], rows)


def _markdown(sweep: SweepFile, now: Mapping[str, str], rows: list[Row]) -> str:
    parts = [f"# {sweep.title}", *_summary(sweep, now), _NOTES, _pipes(*results_table(rows))]
    if (rates := rates_table(rows)) is not None:
        parts += [_RATES, _pipes(*rates)]
    failed = [sweep.plan.runs[i].name for i, word in now.items() if word == state.FAILED]
    if failed:
        parts.append(f"Failed: {', '.join(failed)}.")
    return "\n\n".join(parts) + "\n"


def _pipes(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _csv(rows: Sequence[Row]) -> str:
    """The table with all digits, mean and standard deviation in columns of their own."""
    kinds = [f"{key} {what}" for key in METRICS for what in ("mean", "std")]
    names = ["init", "label", "finetune", "label_fraction", "checkpoint", "seeds", "wanted", "rate"]
    costs = ["images_per_second", "memory_mib", "minutes"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *kinds, *costs])
    for row in rows:
        values = [row.metrics[key][what] for key in METRICS for what in ("mean", "std")]
        writer.writerow(
            [*(getattr(row, n) for n in names), *values, *(getattr(row, c) for c in costs)]
        )
    return buffer.getvalue()
