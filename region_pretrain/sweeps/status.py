"""How far a sweep is, as a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tabulate import tabulate

from region_pretrain.jobs.attempts import read_attempts
from region_pretrain.sweeps import jobs, local, state
from region_pretrain.sweeps.state import SweepFile

HEADER = ["run", "state", "iteration", "ETA", "last", "attempts", "job"]


def status_rows(sweep: SweepFile, now: dict[str, str]) -> list[list[str]]:
    """One row a run, under :data:`HEADER`.

    Args:
        sweep: the sweep.
        now: the runs' states.
    """
    rows = []
    for run in sweep.plan.runs.values():
        word, record = now[run.id], state.read_record(run)
        at = state.progress(run)
        rows.append(
            [
                run.name,
                word,
                f"{at.iteration}/{at.max_iter}" if at.iteration else "",
                at.eta if word == state.RUNNING else "",
                at.last,
                str(len(read_attempts(run.folder)) or (record.submitted if record else 0) or ""),
                " ".join(record.job_ids) if record else "",
            ]
        )
    return rows


def status_text(folder: str) -> tuple[str, bool]:
    """The table, what failed, and whether anything can still happen by itself.

    Raises:
        UserError: the folder holds no sweep.
    """
    sweep = state.read_sweep(folder)
    now = jobs.states(sweep.plan, jobs.live_jobs(sweep.cluster, folder))
    runs = sweep.plan.runs
    parts = [tabulate(status_rows(sweep, now), HEADER, disable_numparse=True)]
    blocked = state.blocked_by(sweep.plan, {i for i, word in now.items() if word == state.FAILED})
    for name, word in now.items():
        if word == state.FAILED:
            held = [runs[b].name for b, cause in blocked.items() if cause == name]
            waits = f"; these wait for it: {', '.join(held)}" if held else ""
            lines = state.failure(state.read_record(runs[name]))
            parts.append("\n  ".join([f"{runs[name].name} failed{waits}", *lines]))
    parts.append(state.counted(now))
    going = any(word not in state.ENDED for word in now.values())
    if going and sweep.cluster.kind == "local" and local.coordinator_pid(folder) is None:
        going = False
        parts.append("its process is gone: start the sweep again, and it goes on")
    return "\n\n".join(parts), going


def all_finished(folder: str) -> bool:
    """Whether a sweep is done, and nothing failed."""
    return all(map(state.is_finished, state.read_sweep(folder).plan.runs.values()))


def wait(folder: str, say: Callable[[str], None] = print, every: float = 5.0) -> None:
    """Show the table until the sweep has ended; on a terminal in one place."""
    lines, shown = 0, ""
    while True:
        text, going = status_text(folder)
        if text != shown:
            if sys.stdout.isatty() and lines:
                say(f"\x1b[{lines}A\x1b[J{text}")
            else:
                say(text)
            lines, shown = text.count("\n") + 1, text
        if not going:
            return
        time.sleep(every)
