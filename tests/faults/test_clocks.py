"""Clocks that jump by hours, or differ between machines."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from forked import LONG, Process
from tiny_run import CLOCK, make_config

from region_pretrain import files, lease
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.files import now_at, remove_parts
from region_pretrain.jobs import attempts
from region_pretrain.metrics import read_metrics
from region_pretrain.progress import Progress, read_progress, write_progress
from region_pretrain.sweeps import report, state, status

HOUR = 3600.0


class JumpingClock(HookBase):
    """At some iterations, the clock jumps by hours; the last one waits for a file."""

    def __init__(self, hours: dict, file: str = ""):
        self._hours, self._file = dict(hours), file
        self._real = time.time

    def before_step(self) -> None:
        time.sleep(0.05)
        while self._file and self.trainer.iter == self.trainer.max_iter - 1:
            if os.path.exists(self._file):
                break
            time.sleep(0.05)
        if self.trainer.iter in self._hours:
            real, now = self._real, time.time() - self._real()
            offset = now + HOUR * self._hours[self.trainer.iter]
            time.time = lambda: real() + offset


def trained(folder, hours):
    cfg = make_config(folder, hooks=[L(JumpingClock)(hours=hours)])
    process = Process(lambda: do_pretrain(cfg), folder.with_suffix(".out"))
    assert process.wait(LONG) == 0, folder.with_suffix(".out").read_text()
    return folder


def test_a_run_whose_clock_jumps_computes_and_estimates_the_same(tmp_path):
    usual, jumping = (
        trained(tmp_path / name, hours)
        for name, hours in (("usual", {}), ("jumping", {5: 7.0, 9: -30.0, 14: 26.0}))
    )
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(str(folder))]
        for folder in (usual, jumping)
    ]
    assert len(rows[0]) == 20 and rows[0] == rows[1]
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (usual, jumping))
    for part in ("model", "pretraining"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    text = jumping.with_suffix(".out").read_text()
    etas = re.findall(r"eta (\d+):(\d\d):(\d\d)", text)
    assert len(etas) == 20 and {hours for hours, _, _ in etas} == {"0"}
    assert all(0 < row["time"] < HOUR for row in read_metrics(str(jumping)))


def test_a_lease_does_not_depend_on_clocks(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_SILENCE_SECONDS", 1.0)
    out, folder = tmp_path / "out", tmp_path / "run"
    hours = {2: 12.0, 6: -24.0}
    refused = tmp_path / "refused"
    cfg = make_config(folder, hooks=[L(JumpingClock)(hours=hours, file=str(refused))])
    first = Process(lambda: do_pretrain(cfg), out)
    while not (folder / "metrics.json").exists():
        assert first.poll() is None, out.read_text()
        time.sleep(0.01)

    @exit_on_user_error
    def second() -> None:  # on a machine whose clock is two days ahead
        real = time.time
        time.time = lambda: real() + 48 * HOUR
        lease.machine = lambda: "elsewhere"
        do_pretrain(make_config(folder), resume=True)

    assert Process(second, tmp_path / "second").wait(LONG) == 2
    assert "is in use by process" in (tmp_path / "second").read_text()
    refused.touch()
    assert first.wait(LONG) == 0, out.read_text()


@pytest.fixture
def clock(monkeypatch):
    """Set by how many seconds the clock of this machine is wrong."""
    real = time.time

    def set_offset(seconds):
        monkeypatch.setattr(time, "time", lambda: real() + seconds)

    return set_offset


@pytest.mark.parametrize("jump", [-5 * HOUR, 5 * HOUR])
def test_the_duration_of_an_attempt_is_measured(tmp_path, clock, jump):
    attempts.start_attempt(str(tmp_path), "7", 0, "here")
    clock(jump)
    attempts.end_attempt(str(tmp_path), "finished")
    (attempt,) = attempts.read_attempts(str(tmp_path))
    assert 0 <= attempt["ended"] - attempt["started"] < HOUR


def test_an_attempt_that_another_machine_ends_does_not_end_before_its_start(tmp_path, clock):
    attempts.start_attempt(str(tmp_path), "7", 0, "here")
    attempts._began.clear()  # as in another process
    clock(-5 * HOUR)
    attempts.end_attempt(str(tmp_path), "killed")
    (attempt,) = attempts.read_attempts(str(tmp_path))
    assert attempt["ended"] == attempt["started"]


def test_a_product_older_than_its_attempt_has_no_negative_duration(sweeps, clock):
    sweeps.add("a")
    (run,) = sweeps.plan.runs.values()
    clock(5 * HOUR)
    attempts.start_attempt(run.folder, "7", 0, "here")
    Path(run.product).touch()
    assert state.minutes(run) == 0
    assert report._wall_time(sweeps.file()) == ""


@pytest.mark.parametrize("wrong", [-48 * HOUR, 0, 48 * HOUR])
def test_parts_of_other_machines_are_judged_by_the_clock_of_the_file_system(tmp_path, clock, wrong):
    young, old = (tmp_path / f"x.arrow.part-elsewhere-{pid}" for pid in (1, 2))
    young.touch(), old.touch()
    os.utime(old, (0, time.time() - 25 * HOUR))
    clock(wrong)
    remove_parts(str(tmp_path), shared=True)
    assert os.listdir(tmp_path) == [young.name]


@pytest.mark.parametrize("wrong", [-2 * HOUR, 0, 2 * HOUR])
def test_the_status_of_a_stuck_run_says_for_how_long(sweeps, clock, wrong):
    sweeps.add("a")
    (run,) = sweeps.plan.runs.values()
    path = Path(run.folder, "progress.json")
    path.parent.mkdir(parents=True)
    write_progress(str(path), Progress(120, 434, 190.4))
    now = now_at(run.folder)
    clock(wrong)
    assert status.progress_line(run) == "a: iteration 120/434, ETA 0:03:10"
    os.utime(path, (0, now - 301))
    assert status.progress_line(run) == "a: iteration 120/434 (unchanged for 5 min), ETA 0:03:10"
    rows = [status.status_rows(sweeps.file(), {"a": word})[0][2] for word in ("running", "failed")]
    assert rows == ["120/434 (unchanged for 5 min)", "120/434"]
    assert read_progress(str(path)).updated == pytest.approx(now - 301)


def test_the_clock_of_a_folder(tmp_path, clock):
    clock(5 * HOUR)
    path = tmp_path / "x"
    path.touch()
    assert now_at(str(tmp_path)) == pytest.approx(path.stat().st_mtime, abs=HOUR)
    assert os.listdir(tmp_path) == ["x"]
    assert now_at(str(tmp_path / "none")) == pytest.approx(time.time(), abs=HOUR)


def test_only_what_takes_long_is_reported(capsys):
    with files.reported_if_stuck("output/x", LONG):
        pass
    assert capsys.readouterr().err == ""
    printed, deadline = "", time.monotonic() + LONG
    with pytest.raises(UserError), files.reported_if_stuck("output/x", 0.05):
        while not printed.endswith("\n") and time.monotonic() < deadline:
            printed += capsys.readouterr().err
            time.sleep(0.01)
        raise UserError("passed on")
    line = "output/x: the file system has not answered for 0 s; waiting\n"
    assert printed + capsys.readouterr().err == line
