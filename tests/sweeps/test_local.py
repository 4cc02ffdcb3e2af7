"""Runs of a sweep on this machine: their order, their cores, their failures, and after a kill."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import jobs, local, state, status, submission
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, Plan, Run
from region_pretrain.sweeps.state import SweepFile

ROOT = Path(__file__).parents[2]
#: Says when it ran and with how many threads; fails, or stays until a file appears, when told to.
TOOL = """
import json, os, sys, time, pathlib
product, events, word = sys.argv[-3:]
def note(what):
    threads = os.environ.get("OMP_NUM_THREADS")
    with open(events, "a") as f:
        f.write(json.dumps([what, product, time.time(), threads]) + chr(10))
note("start")
if word.startswith("wait:"):
    while not os.path.exists(word[5:]):
        time.sleep(0.05)
if word.startswith("fail_once:") and not os.path.exists(word[10:]):
    pathlib.Path(word[10:]).touch()
    print("a line before")
    print("error: no data set is called x", file=sys.stderr)
    sys.exit(2)
time.sleep(0.3)
note("end")
pathlib.Path(product).touch()
"""


class Sweeps:
    """A sweep of fake runs in a folder."""

    def __init__(self, folder: Path) -> None:
        (folder / "code/tools").mkdir(parents=True)
        (folder / "code/tools/fake.py").write_text(TOOL)
        self.code, self.folder, self.events = folder / "code", folder / "out", folder / "events"
        self.plan = Plan()

    def add(self, name: str, *parents: str, word: str = "go") -> None:
        folder = self.folder / "runs" / name
        product = str(folder / "product")
        kind = FINETUNE if parents else PRETRAIN
        task = (product, str(self.events), word)
        self.plan.runs[name] = Run(
            name, kind, name, "tools/fake.py", (task,), str(folder), product, parents
        )

    def file(self, at_once: int = 2, name: str = "mine") -> SweepFile:
        cluster = Cluster(kind="local", jobs=at_once)
        code = str(self.code)
        return SweepFile(name, name, "", cluster, code, code, {}, None, self.plan)

    def start(self, at_once: int = 2) -> None:
        submission.start(self.file(at_once), str(self.folder), lambda line: None)

    def wait(self, seconds: float = 60) -> dict[str, str]:
        """Until nothing goes on by itself."""
        end = time.monotonic() + seconds
        while status.status_text(str(self.folder))[1]:
            assert time.monotonic() < end, status.status_text(str(self.folder))[0]
            time.sleep(0.2)
        return self.states()

    def states(self) -> dict[str, str]:
        cluster = Cluster(kind="local")
        return jobs.states(self.plan, jobs.live_jobs(cluster, str(self.folder)))

    def noted(self) -> list[tuple[str, str, float, str]]:
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        rows = [json.loads(line) for line in lines]
        return [(what, Path(product).parent.name, at, cores) for what, product, at, cores in rows]

    def until(self, condition, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    made = Sweeps(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(submission, "take_snapshot", lambda folder: str(made.code))
    yield made
    if (made.folder / "sweep.json").exists():
        local.cancel_local(str(made.folder))


def test_order_number_at_once_and_cores(sweeps):
    for name in "ab":
        sweeps.add(name)
    sweeps.add("c", "a")
    sweeps.add("d", "a", "b")
    sweeps.start(2)
    assert set(sweeps.wait().values()) == {state.FINISHED}
    noted = sweeps.noted()
    at = {(what, name): time for what, name, time, _ in noted}
    assert len(noted) == len(at) == 8  # each ran once
    assert at["start", "c"] > at["end", "a"]
    assert at["start", "d"] > max(at["end", "a"], at["end", "b"])
    running = most = 0
    for what, *_ in sorted(noted, key=lambda row: row[2]):
        running += 1 if what == "start" else -1
        most = max(most, running)
    assert most <= 2
    cores = len(os.sched_getaffinity(0))
    assert {row[3] for row in noted} == {str(max(1, cores // 2))}


def test_a_failure_is_alone_named_and_mended_by_starting_again(sweeps, tmp_path):
    sweeps.add("good")
    sweeps.add("bad", word=f"fail_once:{tmp_path / 'tried'}")
    sweeps.add("after_bad", "bad")
    sweeps.add("after_that", "after_bad")
    sweeps.add("after_good", "good")
    sweeps.start()
    assert sweeps.wait() == {
        "good": state.FINISHED,
        "bad": state.FAILED,
        "after_bad": state.BLOCKED,
        "after_that": state.BLOCKED,
        "after_good": state.FINISHED,
    }
    text, going = status.status_text(str(sweeps.folder))
    assert not going
    said = "bad failed; these wait for it: after_bad, after_that\n  error: no data set is called x"
    assert said in text
    before = len(sweeps.noted())
    sweeps.start()
    assert set(sweeps.wait().values()) == {state.FINISHED}
    again = [name for what, name, *_ in sweeps.noted()[before:] if what == "start"]
    assert again == ["bad", "after_bad", "after_that"]  # and nothing that was finished
    assert state.read_record(sweeps.plan.runs["bad"]).submitted == 2
    assert state.read_record(sweeps.plan.runs["good"]).submitted == 1
    sweeps.start()  # nothing to do
    assert len(sweeps.noted()) == before + 6


def test_killed_coordinator_started_again_goes_on_beside_its_old_job(sweeps, tmp_path):
    sweeps.add("long", word=f"wait:{tmp_path / 'gate'}")
    sweeps.add("later", "long")
    sweeps.start()
    sweeps.until(lambda: sweeps.noted())
    os.kill(local.coordinator_pid(str(sweeps.folder)), signal.SIGKILL)
    sweeps.until(lambda: local.coordinator_pid(str(sweeps.folder)) is None)
    assert sweeps.states() == {"long": state.RUNNING, "later": state.WAITING}
    text, going = status.status_text(str(sweeps.folder))
    assert not going and "start the sweep again" in text
    sweeps.start()
    time.sleep(1.5)
    (tmp_path / "gate").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}
    assert [name for what, name, *_ in sweeps.noted() if what == "start"] == ["long", "later"]


def test_cancelled_runs_stop_and_are_taken_up_again(sweeps, tmp_path):
    sweeps.add("long", word=f"wait:{tmp_path / 'gate'}")
    sweeps.add("later", "long")
    sweeps.start()
    sweeps.until(lambda: sweeps.noted())
    assert submission.cancel(str(sweeps.folder)) == ["long"]
    assert sweeps.states()["long"] == state.CANCELLED
    assert local.coordinator_pid(str(sweeps.folder)) is None
    assert not jobs.live_jobs(Cluster(kind="local"), str(sweeps.folder))
    (tmp_path / "gate").touch()
    time.sleep(0.5)
    assert len(sweeps.noted()) == 1  # the process is gone
    sweeps.start()
    assert set(sweeps.wait().values()) == {state.FINISHED}


def test_debug_runs_in_this_shell_one_after_the_other(sweeps, tmp_path):
    sweeps.add("bad", word=f"fail_once:{tmp_path / 'tried'}")
    sweeps.add("after_bad", "bad")
    sweeps.add("good")
    said = []
    sweep = dataclasses.replace(sweeps.file(), cluster=Cluster(kind="debug"))
    submission.start(sweep, str(sweeps.folder), said.append)
    assert [name for what, name, *_ in sweeps.noted() if what == "end"] == ["good"]
    assert "[after_bad] cannot start: what it needs has failed" in said
    assert sweeps.states() == {"bad": "failed", "after_bad": "blocked", "good": "finished"}
    submission.start(sweep, str(sweeps.folder), said.append)
    ended = [name for what, name, *_ in sweeps.noted() if what == "end"]
    assert ended == ["good", "bad", "after_bad"]


def test_folder_of_another_sweep_or_of_something_else(sweeps, tmp_path):
    sweeps.add("a")
    state.claim(str(sweeps.folder), "other")
    state.write_sweep(str(sweeps.folder), sweeps.file(name="other"))
    with pytest.raises(UserError, match="folder of the sweep other, not of mine"):
        sweeps.start()
    assert not sweeps.noted()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(UserError, match="exists and holds no sweep"):
        state.claim(str(tmp_path / "full"), "mine")
    with pytest.raises(UserError, match="holds no sweep"):
        status.status_text(str(tmp_path / "full"))


def test_what_slurm_cancelled_since_its_parent_failed_is_blocked(sweeps):
    sweeps.add("a")
    sweeps.add("b", "a")
    sweeps.add("c", "b")
    for name in "abc":  # all were submitted, and none is in the queue any more
        state.write_record(sweeps.plan.runs[name], state.Record(1, [f"7_{name}"], []))
    assert sweeps.states() == {"a": state.FAILED, "b": state.BLOCKED, "c": state.BLOCKED}
    Path(sweeps.plan.runs["a"].product).touch()
    assert sweeps.states() == {"a": state.FINISHED, "b": state.FAILED, "c": state.BLOCKED}
