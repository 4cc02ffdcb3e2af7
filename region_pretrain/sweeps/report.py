"""The report of a sweep: a page, a Markdown table and a CSV file, also while the sweep runs."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from region_pretrain.engine.environment import machine, versions
from region_pretrain.files import make_writable, write_atomic, write_text_atomic
from region_pretrain.jobs import slurm
from region_pretrain.metrics import logged_rows
from region_pretrain.reporting import html as report
from region_pretrain.reporting.plots import metric_curve, plot_curves
from region_pretrain.reporting.summary import text_table, union_length
from region_pretrain.sweeps import jobs, state
from region_pretrain.sweeps.code import finished_by_code
from region_pretrain.sweeps.figures import figures
from region_pretrain.sweeps.pictures import SweepPictures
from region_pretrain.sweeps.results import collect, collect_probes, pretrainings
from region_pretrain.sweeps.rows import METRICS, Row, read_csv, results_csv
from region_pretrain.sweeps.state import SweepFile
from region_pretrain.sweeps.tables import Table, row_name, tables
from region_pretrain.tracking.service import SERVICES, TrackedRun, read_tracked

HTML, MARKDOWN, CSV = "report.html", "report.md", "results.csv"


def write_sweep_report(folder: str) -> list[str]:
    """Write the report of a sweep's current state into its folder.

    It needs no SLURM: where SLURM does not answer, unfinished runs are ``unknown``.

    Returns:
        Paths of the page, the Markdown table and the CSV file.

    Raises:
        UserError: the folder contains no sweep.
    """
    sweep = state.read_sweep(folder)
    try:
        now = jobs.states_now(sweep, folder)
    except slurm.Unavailable:
        now = {
            run.id: state.FINISHED if state.is_finished(run) else state.UNKNOWN
            for run in sweep.plan.runs.values()
        }
    rows = collect(sweep)
    found = tables(rows, _probes(sweep))
    paths = [os.path.join(folder, name) for name in (HTML, MARKDOWN, CSV)]
    report.write_report(paths[0], _sections(sweep, folder, now, rows, found), sweep.title)
    write_text_atomic(paths[1], _markdown(sweep, now, found))
    write_text_atomic(paths[2], results_csv(rows, sweep.name))
    return paths


def write_tables(path: str, references: Sequence[str], folder: str) -> list[str]:
    """Write the tables and figures of a ``results.csv``, which needs none of the sweep's runs.

    Args:
        path: the CSV file, possibly renamed.
        references: see :func:`~region_pretrain.sweeps.tables.tables`.
        folder: folder to write to; created.

    Returns:
        Paths of ``<name>.md`` and of ``<name>_*.png``, named after the CSV file.

    Raises:
        UserError: the file cannot be read or lacks a reference, or the folder cannot be written.
    """
    rows = read_csv(path)
    name = os.path.splitext(os.path.basename(path))[0]
    parts = _table_parts(tables(rows, {}, references))
    pictures = [(f"{name}_{figure.name}.png", figure) for figure in figures(rows)]
    parts += [f"![{figure.caption}]({file})" for file, figure in pictures]
    make_writable(folder, "the output folder")
    paths = [os.path.join(folder, file) for file in (f"{name}.md", *(f for f, _ in pictures))]
    write_text_atomic(paths[0], "\n\n".join(parts) + "\n")
    for picture, (_, figure) in zip(paths[1:], pictures, strict=True):
        write_atomic(picture, lambda file, png=figure.png: file.write(png))
    return paths


def results_text(folder: str) -> str:
    """The main tables as plain text for a terminal.

    Raises:
        UserError: the folder contains no sweep.
    """
    sweep = state.read_sweep(folder)
    parts = tables_text(tables(collect(sweep), _probes(sweep), brief=True))
    if sweep.notes:
        parts.append(textwrap.fill(sweep.notes, 90))
    return "\n\n".join(parts)


def tables_text(found: Sequence[Table]) -> list[str]:
    """Tables as plain text for a terminal, each with its caption."""
    return [f"{textwrap.fill(t.caption, 90)}\n{text_table(t.rows, t.header)}" for t in found]


def _probes(sweep: SweepFile) -> dict[str, Any]:
    return {sweep.labels[init]: probes for init, probes in collect_probes(sweep).items()}


def _summary(sweep: SweepFile, now: Mapping[str, str]) -> list[str]:
    facts = ", ".join(f"{name} {version}" for name, version in versions().items())
    here = machine()
    host = ", ".join([here["cpu"], f"{here['cores']} cores", *filter(None, [here.get("gpu")])])
    seen = f" Every pre-training sees {sweep.images_seen:,} images." if sweep.images_seen else ""
    return [
        f"{len(now)} runs: {state.counted(now)}.{_wall_time(sweep)}{seen}",
        f"Command: {sweep.command}",
        f"Report written on: {host}; {facts}.",
        *_codes(sweep),
        *([sweep.notes] if sweep.notes else []),
    ]


def _codes(sweep: SweepFile) -> list[str]:
    """A line if the finished runs were computed with different code."""
    codes = {name: len(runs) for name, runs in finished_by_code(sweep.plan).items()}
    shown = ", ".join(f"{count} with {name}" for name, count in codes.items())
    text = f"Finished runs were computed with different code: {shown} of "
    return [f"{text}{os.path.dirname(sweep.root)}."] if len(codes) > 1 else []


def _wall_time(sweep: SweepFile) -> str:
    """How long at least one run was running, so far."""
    attempts = [a for run in sweep.plan.runs.values() for a in state.attempts(run)]
    seconds = union_length((a["started"], a["ended"]) for a in attempts if a.get("ended"))
    return f" At least one run was running for {seconds / 60:.1f} minutes." if seconds else ""


def _sections(
    sweep: SweepFile,
    folder: str,
    now: Mapping[str, str],
    rows: list[Row],
    found: Sequence[Table],
) -> list[report.Section]:
    pictures = SweepPictures(sweep, folder)
    results = [report.text(text) for text in _summary(sweep, now)]
    for table in found:
        results += [report.text(table.caption), report.table(table.header, table.rows)]
    plots = [report.figure(f.png, f.caption, plot=True) for f in figures(rows)]
    sections = [
        report.Section("Results", [*results, *([report.side_by_side(plots)] if plots else [])]),
        report.Section("Failures", _failures(sweep, now)),
        report.Section("AP during fine-tuning", _ap_curves(rows)),
        report.Section("Detections", pictures.detections()),
        report.Section("Pre-training losses", _loss_curves(sweep)),
        report.Section("What pre-training sees", pictures.views()),
        report.Section("Runs", [_runs_table(sweep, folder, now)]),
    ]
    return [section for section in sections if section.blocks]


def _failures(sweep: SweepFile, now: Mapping[str, str]) -> list[str]:
    blocks = []
    runs = sweep.plan.runs
    failed = {name for name, word in now.items() if word == state.FAILED}
    blocked = state.blocked_by(sweep.plan, failed)
    for name in sorted(failed, key=list(runs).index):
        held = [runs[b].name for b, cause in blocked.items() if cause == name]
        waits = f" These runs depend on it: {', '.join(held)}." if held else ""
        blocks.append(report.text(f"{runs[name].name} failed.{waits} Its log ends with:"))
        blocks.append(report.preformatted(state.failure(runs[name])))
    return blocks


def _ap_curves(rows: Sequence[Row]) -> list[report.Markup]:
    """One diagram per fine-tuning, label fraction and task, with one curve per initialisation."""
    lines, several = [], len({row.finetune for row in rows}) > 1
    for finetune, fraction in dict.fromkeys((row.finetune, row.label_fraction) for row in rows):
        mine = [r for r in rows if (r.finetune, r.label_fraction) == (finetune, fraction)]
        columns = ["checkpoint"] if len({row.checkpoint for row in mine}) > 1 else []
        blocks = []
        for key in ("bbox/AP", "segm/AP"):
            curves = {" ".join(row_name(r, columns)): r.curves[key] for r in mine}
            curves = {name: curve for name, curve in curves.items() if curve[0]}
            if any(len(steps) > 1 for steps, _ in curves.values()):
                caption = f"{METRICS[key]}, {100 * fraction:g} % of the labels, mean over the seeds"
                caption = f"{finetune}: {caption}" if several else caption
                png = plot_curves(curves, "fine-tuning iteration", f"{METRICS[key]} (%)")
                blocks.append(report.figure(png, caption, plot=True))
        lines += [report.side_by_side(blocks)] if blocks else []
    return lines


def _loss_curves(sweep: SweepFile) -> list[report.Markup]:
    """One diagram per pre-training, as losses are not comparable, with one curve per seed."""
    blocks = []
    for init, by_seed in pretrainings(sweep).items():
        curves = {
            f"seed {s}": metric_curve(logged_rows(r.folder), "total_loss")
            for s, r in by_seed.items()
        }
        curves = {name: curve for name, curve in curves.items() if curve[0]}
        if curves:
            png = plot_curves(curves, "iteration", "total loss")
            caption = f"Pre-training loss of {sweep.labels[init]}"
            blocks.append(report.figure(png, caption, plot=True))
    return [report.side_by_side(blocks)] if blocks else []


def _runs_table(sweep: SweepFile, folder: str, now: Mapping[str, str]) -> str:
    tracked = {run.id: read_tracked(run.folder) for run in sweep.plan.runs.values()}
    services = [name for name in SERVICES if any(name in found for found in tracked.values())]
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
                *(_tracker_page(tracked[run.id].get(name)) for name in services),
            ]
        )
    titles = [SERVICES[name] for name in services]
    return report.table(["run", "state", "progress", "attempts", "min", "log", *titles], rows)


def _tracker_page(run: TrackedRun | None) -> report.Link | str | None:
    if run is None:
        return None
    return report.Link("page", run.url) if run.url else run.id


def _markdown(sweep: SweepFile, now: Mapping[str, str], found: Sequence[Table]) -> str:
    parts = [f"# {sweep.title}", *_summary(sweep, now), *_table_parts(found)]
    failed = [sweep.plan.runs[i].name for i, word in now.items() if word == state.FAILED]
    if failed:
        parts.append(f"Failed: {', '.join(failed)}.")
    return "\n\n".join(parts) + "\n"


def _table_parts(found: Sequence[Table]) -> list[str]:
    return [part for t in found for part in (t.caption, _pipes(t.header, t.rows))]


def _pipes(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
