"""The status of a sweep, read from the files of its runs, and what --wait prints."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from region_pretrain.jobs import slurm
from region_pretrain.jobs.attempts import end_attempt, start_attempt
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.progress import Progress, write_progress
from region_pretrain.sweeps import jobs, state, status, submission
from region_pretrain.sweeps.graph import REGIONS, Run

#: Holds a lease until its input ends.
HOLD = """
import sys
from region_pretrain.lease import hold
with hold({folder!r}, {name!r}):
    print(flush=True)
    sys.stdin.read()
"""


def folder_of(run):
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def log(run, **metrics):
    with open(folder_of(run) / "metrics.json", "a") as file:
        file.write(json.dumps(metrics) + "\n")


def test_progress_of_a_training(sweeps):
    sweeps.add("soco_seed0")
    (run,) = sweeps.plan.runs.values()
    assert state.progress(run) is None and status.progress_line(run) == ""
    assert status.status_rows(sweeps.file(), {run.id: state.WAITING})[0][:5] == [
        "soco_seed0", "waiting", "", "", ""
    ]  # fmt: skip
    log(run, iteration=99, total_loss=3.25)
    log(run, iteration=119, total_loss=-5.125)
    write_progress(f"{run.folder}/progress.json", Progress(120, 434, 190.4))
    line = "soco_seed0: iteration 120/434, loss -5.125, ETA 0:03:10"
    assert status.progress_line(run) == line
    row = status.status_rows(sweeps.file(), {run.id: state.RUNNING})[0]
    assert row[:5] == ["soco_seed0", "running", "120/434", "0:03:10", "loss -5.125"]
    assert status.status_rows(sweeps.file(), {run.id: state.FAILED})[0][3] == ""


def test_a_run_that_was_started_again_is_not_quiet_yet(sweeps, monkeypatch):
    sweeps.add("soco_seed0")
    (run,) = sweeps.plan.runs.values()
    log(run, iteration=119, total_loss=1.0)
    write_progress(f"{run.folder}/progress.json", Progress(120, 434, 190.4))
    start_attempt(run.folder, "1", 0, "host")
    began = time.time()
    now = [began + 600]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(status, "now_at", lambda folder: now[0])

    def progress():
        return status.status_rows(sweeps.file(), {run.id: state.RUNNING})[0][2]

    assert progress() == "120/434 (unchanged for 10 min)"
    start_attempt(run.folder, "2", 0, "host")
    assert progress() == "120/434"
    now[0] += 180
    assert progress() == "120/434 (unchanged for 3 min)"


@pytest.mark.parametrize(
    ("aps", "shown"),
    [([1.0, 12.34], "box AP 12.3"), ([float("nan")], "loss 0.5"), ([], "loss 0.5")],
)
def test_newest_ap_otherwise_newest_loss(sweeps, aps, shown):
    sweeps.add("det")
    (run,) = sweeps.plan.runs.values()
    for i, ap in enumerate(aps):
        log(run, iteration=i, **{"bbox/AP": ap})
    log(run, iteration=9, total_loss=0.5)
    assert status.newest_value(run) == shown


def test_progress_of_region_generation_is_the_sum_of_its_shards(tmp_path):
    product = tmp_path / "x [1]/regions.arrow"
    run = Run("r", REGIONS, "regions_soco", "t.py", ((),), str(product.parent), str(product))
    parts = Path(f"{product}.parts")
    parts.mkdir(parents=True)
    assert state.progress(run) is None
    write_progress(str(parts / "progress-0.json"), Progress(30, 100, 7.0))
    write_progress(str(parts / "progress-1.json"), Progress(20, 101, 8.0))
    write_progress(str(parts / "progress-10.json"), Progress(0, 100))
    assert status.progress_line(run) == "regions_soco: image 50/301, ETA 0:00:08"
    for i, updated in ((0, 1.0), (1, 3.0), (10, 2.0)):
        os.utime(parts / f"progress-{i}.json", (0, updated))
    assert state.progress(run) == Progress(50, 301, 8.0, 3.0)


def test_a_sweep_that_was_cancelled_was_not_killed(sweeps):
    sweeps.add("a")
    sweeps.add("b", "a")
    folder = str(sweeps.folder)
    state.claim(folder, "mine")
    state.write_sweep(folder, sweeps.file())
    for cancelled, cause in ((True, "the sweep was cancelled"), (False, "process was killed")):
        state.write_record(sweeps.plan.runs["a"], state.Record(1, [], cancelled=cancelled))
        text, going = status.status_text(folder)
        assert f"{cause}: start the sweep again" in text and not going


def test_a_debug_run_is_running_while_its_start_is(sweeps):
    for name in ("done", "now"):
        sweeps.add(name)
        state.write_record(sweeps.plan.runs[name], state.Record(1, [f"job {name}"]))
    sweeps.add("next", "now")
    folder = str(sweeps.folder)
    state.write_sweep(folder, replace(sweeps.file(), cluster=Cluster(kind="debug")))
    start_attempt(sweeps.plan.runs["done"].folder, "job done", 0, "here")
    end_attempt(sweeps.plan.runs["done"].folder, "failed")
    assert jobs.states_now(state.read_sweep(folder), folder)["now"] == state.FAILED
    there = [sys.executable, "-c", HOLD.format(folder=folder, name=jobs.START_LEASE)]
    with subprocess.Popen(there, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = jobs.states_now(state.read_sweep(folder), folder)
        text, going = status.status_text(folder)
        process.stdin.close()
    assert found == {"done": state.FAILED, "now": state.RUNNING, "next": state.WAITING}
    assert going and "killed" not in text


class NetworkDisk:
    """An NFS client, which remembers for a while that a file was missing, or until it looks again.

    Attributes:
        updates: whether it sees new files when it lists their folder.
    """

    def __init__(self, run, monkeypatch) -> None:
        self.updates, self._hidden, self._folder = False, run.product, os.path.dirname(run.product)
        self._exists, self._listdir = os.path.exists, os.listdir
        monkeypatch.setattr(os.path, "exists", lambda p: p != self._hidden and self._exists(p))
        monkeypatch.setattr(os, "listdir", self._list)

    def _list(self, path="."):
        if self.updates and path == self._folder:
            self._hidden = None
        return self._listdir(path)


@pytest.fixture
def just_finished(sweeps, monkeypatch):
    """A sweep on SLURM: job 1 has written ``pre`` and left the queue, job 2 waits for it."""
    monkeypatch.setattr(slurm, "jobs_of", lambda user="": {"2": "PENDING"})
    monkeypatch.setattr(slurm, "waiting_reasons", lambda user="": {})
    sweeps.add("pre")
    sweeps.add("det", "pre")
    for job, run in enumerate(sweeps.plan.runs.values(), 1):
        state.write_record(run, state.Record(1, [str(job)]))
    run = sweeps.plan.runs["pre"]
    start_attempt(run.folder, "1", 0, "n1")
    Path(run.product).touch()
    end_attempt(run.folder, "finished")
    file = replace(sweeps.file(), cluster=Cluster(kind="slurm"))
    state.write_sweep(str(sweeps.folder), file)
    return file, run


def test_a_run_whose_product_is_not_visible_yet_has_not_failed(just_finished, sweeps, monkeypatch):
    (file, run), folder = just_finished, str(sweeps.folder)
    disk = NetworkDisk(run, monkeypatch)
    now = jobs.states_now(file, folder)
    assert now == {"pre": state.RUNNING, "det": state.QUEUED}
    assert submission.missing(file.plan, now) == []
    text, going = status.status_text(folder)
    assert going and "failed" not in text
    disk.updates = True
    assert jobs.states_now(file, folder)["pre"] == state.FINISHED
    assert status.status_text(folder)[0].endswith("1 finished, 1 queued")


def test_a_run_whose_product_never_appears_has_failed(just_finished, sweeps, monkeypatch):
    (file, run), folder = just_finished, str(sweeps.folder)
    NetworkDisk(run, monkeypatch)
    for seconds, word in ((80, state.RUNNING), (100, state.FAILED), (600, state.FAILED)):
        ended = time.time() - seconds
        os.utime(f"{run.folder}/attempts.json", (ended, ended))
        now = jobs.states_now(file, folder)
        assert now["pre"] == word, seconds
    assert [run.name for runs, _ in submission.missing(file.plan, now) for run in runs] == ["pre"]
    local = replace(file, cluster=Cluster(kind="local"))  # its disk is this machine's own
    os.utime(f"{run.folder}/attempts.json")
    assert jobs.states_now(local, folder)["pre"] == state.FAILED


@pytest.mark.parametrize("ends", [("finished", "failed"), ("finished", None), ("killed", "killed")])
def test_shards_that_did_not_all_finish_have_failed(just_finished, sweeps, ends):
    file, run = just_finished
    os.remove(run.product)
    os.remove(f"{run.folder}/attempts.json")
    state.write_record(run, state.Record(1, ["1_0", "1_1"]))
    for shard, end in enumerate(ends):
        folder = f"{run.folder}/shard{shard}"
        start_attempt(folder, "0", 0, "n1")
        end_attempt(folder, "finished")  # of an earlier submission
        start_attempt(folder, f"1_{shard}", 0, "n1")
        if end:
            end_attempt(folder, end)
    assert jobs.states_now(file, str(sweeps.folder))["pre"] == state.FAILED
    for shard in range(2):
        start_attempt(f"{run.folder}/shard{shard}", f"1_{shard}", 1, "n1")
        end_attempt(f"{run.folder}/shard{shard}", "finished")
    assert jobs.states_now(file, str(sweeps.folder))["pre"] == state.RUNNING


def test_minutes_and_attempts_of_shards_are_summed(sweeps):
    sweeps.add("a")
    (run,) = sweeps.plan.runs.values()
    for shard, attempts in enumerate(([(0, 60), (100, 130)], [(10, 100)], [(10, None)])):
        folder = folder_of(run) / f"shard{shard}"
        folder.mkdir()
        same = {"job": "7", "restart": 0, "host": "here", "start": "", "outcome": "x"}
        rows = [{"started": a, "ended": b, **same} for a, b in attempts]
        (folder / "attempts.json").write_text(json.dumps(rows))
    assert len(state.attempts(run)) == 4 and state.minutes(run) == 3.0


@pytest.fixture
def waited(sweeps, tmp_path, monkeypatch):
    """Two trainings, and a run that fails before its dependant, followed with wait()."""
    monkeypatch.setattr(status, "_POLL_LOCAL", 0.1)
    gates = tmp_path / "gates"
    gates.mkdir()
    sweeps.add("one", word=f"train:{gates}")
    sweeps.add("two", word=f"train:{gates}")
    sweeps.add("bad", word=f"fail_once:{tmp_path / 'tried'}")
    sweeps.add("after_bad", "bad")

    def wait():
        said = []

        def hear(text):  # a training goes on when this has been said about it
            said.append(text)
            for name in ("one", "two"):
                for i in re.findall(rf"\b{name}\b.* ([12])0/30", text):
                    (gates / f"{name}-{i}").touch()
                if re.search(r"\bbad\b.*\bfailed\b", text):
                    (gates / f"{name}-3").touch()

        sweeps.start(3)
        status.wait(str(sweeps.folder), hear, every=0.2)
        return said

    return wait


def test_wait_prints_starts_progress_ends_and_failures(waited):
    said = waited()
    for name in ("one", "two"):
        mine = [line for line in said if f"] {name}: " in line]
        assert re.fullmatch(rf"\[[0-4]/4\] {name}: started", mine[0])
        progress = [line.split(": ", 1)[1] for line in mine[1:-1]]
        assert progress == sorted(set(progress)) and len(progress) >= 2
        # A run writes its metrics before its progress: the loss may be that of the next step.
        assert set(progress) <= {
            "iteration 10/30, loss -5.1, ETA 0:03:20",
            "iteration 10/30, loss -5.2, ETA 0:03:20",
            "iteration 20/30, loss -5.2, ETA 0:01:40",
            "iteration 20/30, loss -5.3, ETA 0:01:40",
            "iteration 30/30, loss -5.3",
        }
        assert re.fullmatch(rf"\[[12]/4\] {name}: finished, \d+\.\d min", mine[-1])
    (failed,) = [line for line in said if "failed;" in line]
    assert failed == (
        "[0/4] bad: failed; these runs depend on it: after_bad\n  error: no data set is called x"
    )
    assert said.index(failed) < said.index(next(line for line in said if "finished" in line))
    assert said[-1] == "\n2 finished, 1 failed, 1 blocked"
    assert len(said) == sum("iteration" in line for line in said) + 2 * 2 + 2 + 1
    again = waited()  # what is finished already is only counted
    assert not any("] one: " in line or "] two: " in line for line in again)
    assert re.fullmatch(r"\[4/4\] after_bad: finished, \d+\.\d min", again[-2])
    assert again[-1] == "\n4 finished"


def test_wait_redraws_a_table_where_it_fits_the_terminal(waited, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("LINES", "50")
    first, *others = waited()
    assert first.startswith("run ") and "one " in first
    above = first
    for text in others:
        assert text.startswith(f"\x1b[{above.count(chr(10)) + 1}A\x1b[Jrun ")
        above = text
    assert "2 finished, 1 failed, 1 blocked" in others[-1] and "30/30" in others[-1]
    monkeypatch.setenv("LINES", "8")
    assert waited()[-1] == "\n4 finished"
