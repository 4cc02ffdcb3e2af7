"""The state of a sweep: as a table, or line by line while it runs."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from math import isnan, nan

from tabulate import tabulate

from region_pretrain.files import now_at
from region_pretrain.jobs import slurm
from region_pretrain.metrics import newest_metrics
from region_pretrain.progress import Progress
from region_pretrain.sweeps import jobs, local, state
from region_pretrain.sweeps.graph import REGIONS, Run
from region_pretrain.sweeps.state import SweepFile

HEADER = ["run", "state", "progress", "ETA", "last", "attempts", "job"]

#: Seconds between two checks of the runs; each check of SLURM's queue loads its controller.
_POLL_LOCAL, _POLL_SLURM = 1.0, 5.0
_SILENT_SECONDS = 60.0  # between two attempts while SLURM does not answer
_QUIET_SECONDS = 60.0  # without progress, before the table says so

_print = functools.partial(print, flush=True)  # a pipe would buffer the lines


def status_rows(sweep: SweepFile, now: dict[str, str]) -> list[list[str]]:
    """One row per run, with the columns of :data:`HEADER`.

    A queued run has SLURM's reason beside its state, such as ``queued (Priority)``.

    Args:
        sweep: the sweep.
        now: run id -> state.
    """
    rows = []
    reasons = jobs.waiting_reasons(sweep) if state.QUEUED in now.values() else {}
    failed = jobs.failed_jobs(sweep, now)
    for run in sweep.plan.runs.values():
        word, record, at = now[run.id], state.read_record(run), state.progress(run)
        found = (reasons[job] for job in record.job_ids if job in reasons) if record else ()
        reason = next(found, "") if word == state.QUEUED else ""
        if run.id in failed:
            reason = f"{len(failed[run.id])} of {len(record.job_ids)} jobs failed"
        rows.append(
            [
                run.name,
                f"{word} ({reason})" if reason else word,
                f"{at.done}/{at.total}{_unchanged(run, at, word)}" if at else "",
                eta(run) if word == state.RUNNING else "",
                newest_value(run),
                str(len(state.attempts(run)) or (record.submitted if record else 0) or ""),
                " ".join(record.job_ids) if record else "",
            ]
        )
    return rows


def newest_value(run: Run) -> str:
    """A training's newest box AP, otherwise its newest loss; empty if it has logged neither."""
    if run.kind == REGIONS:
        return ""
    metrics = newest_metrics(run.folder)
    ap, loss = (metrics.get(key, nan) for key in ("bbox/AP", "total_loss"))
    if not isnan(ap):  # NaN: the detector found nothing
        return f"box AP {ap:.1f}"
    return "" if isnan(loss) else f"loss {loss:.4g}"


def eta(run: Run) -> str:
    """A run's remaining time as ``H:MM:SS``; empty if it has no estimate."""
    at = state.progress(run)
    return str(timedelta(seconds=round(at.seconds_left))) if at and at.seconds_left else ""


def _unchanged(run: Run, at: Progress, word: str = state.RUNNING) -> str:
    """For how long a running run has made no progress, such as while its disk does not answer."""
    if word != state.RUNNING or at.updated is None:
        return ""
    since = max([at.updated, *(attempt["started"] for attempt in state.attempts(run))])
    seconds = time.time() - since
    if not 0 <= seconds < _QUIET_SECONDS:  # or the clocks differ
        seconds = now_at(os.path.dirname(run.product)) - since
    return f" (unchanged for {seconds // 60:.0f} min)" if seconds >= _QUIET_SECONDS else ""


def progress_line(run: Run) -> str:
    """A run's progress, such as ``soco_seed0: iteration 120/434, loss -5.1, ETA 0:03:10``."""
    at = state.progress(run)
    if at is None:
        return ""
    unit = "image" if run.kind == REGIONS else "iteration"
    left = f"ETA {text}" if (text := eta(run)) else ""
    facts = [f"{unit} {at.done}/{at.total}{_unchanged(run, at)}", newest_value(run), left]
    return f"{run.name}: {', '.join(filter(None, facts))}"


def status_text(folder: str) -> tuple[str, bool]:
    """The table, the failures with their causes, and whether the sweep is still running.

    Raises:
        UserError: the folder contains no sweep.
    """
    sweep = state.read_sweep(folder)
    return _text(sweep, *_look(sweep, folder))


def _text(sweep: SweepFile, now: dict[str, str], going: bool) -> tuple[str, bool]:
    parts = [tabulate(status_rows(sweep, now), HEADER, disable_numparse=True)]
    failed = (run for run in sweep.plan.runs.values() if now[run.id] == state.FAILED)
    parts += [f"{run.name} {_failure(sweep, now, run)}" for run in failed]
    for i, ids in jobs.failed_jobs(sweep, now).items():
        run = sweep.plan.runs[i]
        parts.append(
            "\n  ".join([f"{run.name}: failed jobs: {' '.join(ids)}", *state.failure(run)])
        )
    return "\n\n".join([*parts, _summary(now, going, _is_here(sweep))]), going


def _is_here(sweep: SweepFile) -> bool:
    return sweep.cluster.kind == "local"


def _look(sweep: SweepFile, folder: str) -> tuple[dict[str, str], bool]:
    """Run id -> state, and whether the sweep is still running."""
    # In this order: a coordinator that has just ended normally must not look killed.
    here = _is_here(sweep)
    alone = here and local.coordinator_pid(folder) is None
    now = jobs.states_now(sweep, folder)
    ended = set(state.ENDED)
    if here:  # as long as it runs, the coordinator may start a run again whose process was killed
        ended.remove(state.FAILED)
    elif sweep.cluster.kind == "slurm":  # only another start submits what was not submitted
        ended.add(state.WAITING)
    return now, not alone and any(word not in ended for word in now.values())


def _look_patiently(
    sweep: SweepFile, folder: str, say: Callable[[str], None]
) -> tuple[dict[str, str], bool]:
    """Like :func:`_look`, for as long as SLURM does not answer."""
    look = functools.partial(_look, sweep, folder)
    return slurm.patiently(look, say, seconds=_SILENT_SECONDS, times=None)


def _summary(now: dict[str, str], going: bool, here: bool) -> str:
    text = state.counted(now)
    if not going and any(word not in state.ENDED for word in now.values()):
        cause = "the sweep's process was killed" if here else "some runs were not submitted"
        if state.CANCELLED in now.values():
            cause = "the sweep was cancelled"
        text += f"\n\n{cause}: start the sweep again to resume it"
    return text


def _failure(sweep: SweepFile, now: dict[str, str], run: Run) -> str:
    """What a failed run blocks, and the tail of its log."""
    runs = sweep.plan.runs
    blocked = state.blocked_by(sweep.plan, {i for i, word in now.items() if word == state.FAILED})
    held = [runs[b].name for b, cause in blocked.items() if cause == run.id]
    blocks = f"; these runs depend on it: {', '.join(held)}" if held else ""
    return "\n  ".join([f"failed{blocks}", *state.failure(run)])


def all_finished(folder: str) -> bool:
    """Whether all runs of a sweep are finished."""
    return all(map(state.is_finished, state.read_sweep(folder).plan.runs.values()))


def wait(folder: str, say: Callable[[str], None] = _print, every: float = 5.0) -> None:
    """Follow a sweep until it ends: as a live table if it fits the terminal, otherwise in lines.

    Args:
        folder: the sweep's folder.
        say: receives the text.
        every: seconds between two progress lines.
    """
    sweep = state.read_sweep(folder)
    poll = _POLL_SLURM if sweep.cluster.kind == "slurm" else _POLL_LOCAL
    fits = len(sweep.plan.runs) + 5 < shutil.get_terminal_size().lines
    follow = _table(folder, say) if sys.stdout.isatty() and fits else _lines(folder, say, every)
    while next(follow):
        time.sleep(poll)


def _table(folder: str, say: Callable[[str], None]) -> Iterator[bool]:
    """Redraw the table at each step; yield whether the sweep is still running."""
    sweep, lines, shown = state.read_sweep(folder), 0, ""
    while True:
        text, going = _text(sweep, *_look_patiently(sweep, folder, say))
        if text != shown:
            say(f"\x1b[{lines}A\x1b[J{text}" if lines else text)
            lines, shown = text.count("\n") + 1, text
        yield going


def _lines(folder: str, say: Callable[[str], None], every: float) -> Iterator[bool]:
    """Print what changed at each step; yield whether the sweep is still running."""
    sweep = state.read_sweep(folder)
    runs = sweep.plan.runs.values()
    before = {r.id: state.FINISHED if state.is_finished(r) else state.WAITING for r in runs}
    printed: dict[str, str] = {}  # run id -> its newest progress line, oldest first
    due = time.monotonic() + every
    while True:
        now, going = _look_patiently(sweep, folder, say)
        count = f"[{sum(word == state.FINISHED for word in now.values())}/{len(now)}]"
        for run in runs:
            if now[run.id] != before[run.id] and (event := _event(sweep, now, run)):
                say(f"{count} {run.name}: {event}")
        before = now
        if time.monotonic() >= due:
            order = list(printed)
            running = [run for run in runs if now[run.id] == state.RUNNING]
            # A single line, however many runs there are: that of the run shown least recently.
            for run in sorted(running, key=lambda r: order.index(r.id) if r.id in order else -1):
                if (line := progress_line(run)) and line != printed.get(run.id):
                    say(f"{count} {line}")
                    printed.pop(run.id, None)
                    printed[run.id] = line
                    due = time.monotonic() + every
                    break
        if not going:
            say(f"\n{_summary(now, going, _is_here(sweep))}")
        yield going


def _event(sweep: SweepFile, now: dict[str, str], run: Run) -> str:
    """The text for a run whose state has changed; empty if it is not worth a line."""
    if now[run.id] == state.FAILED:
        return _failure(sweep, now, run)
    words = {state.RUNNING: "started", state.FINISHED: "finished", state.CANCELLED: "cancelled"}
    word, minutes = words.get(now[run.id], ""), state.minutes(run)
    return f"{word}, {minutes:.1f} min" if now[run.id] == state.FINISHED and minutes else word
