"""A sweep of fake runs, which the tests of local execution and of its status share."""

import json
import time
from pathlib import Path

import pytest

from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import jobs, local, status, submission
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, Plan, Run
from region_pretrain.sweeps.state import SweepFile

ROOT = Path(__file__).parents[2]
#: Records when it ran and with how many threads. Its last argument makes it wait for a file, fail
#: once, take two seconds to save a file when asked to stop, or keep a training's files: between two
#: of them it waits, with train:FOLDER for NAME-1, ...
TOOL = """
import json, os, pathlib, signal, sys, time
product, events, word = sys.argv[-3:]
def note(what):
    threads = os.environ.get("OMP_NUM_THREADS")
    with open(events, "a") as f:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        f.write(json.dumps([what, product, time.time(), threads, devices]) + chr(10))
signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # it ends when it is asked to stop
if word.startswith("save:"):
    from region_pretrain.errors import STOPPED
    def save(*_):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        time.sleep(2)
        pathlib.Path(word[5:]).touch()
        sys.exit(STOPPED)
    signal.signal(signal.SIGUSR2, save)
note("start")
if word.startswith("save:"):
    time.sleep(600)
if word.startswith("wait:"):
    while not os.path.exists(word[5:]):
        time.sleep(0.05)
if word.startswith("fail_once:") and not os.path.exists(word[10:]):
    pathlib.Path(word[10:]).touch()
    print("a line before")
    print("error: no data set is called x", file=sys.stderr)
    sys.exit(2)
def wait_for(path):
    end = time.monotonic() + 600
    while not os.path.exists(path):
        if time.monotonic() > end:
            sys.exit("nobody has noticed " + path)
        time.sleep(0.05)
if word.startswith("train"):
    from region_pretrain.progress import Progress, write_progress
    folder = pathlib.Path(product).parent
    for i in (1, 2, 3):
        row = json.dumps({"iteration": 10 * i - 1, "total_loss": -5.0 - i / 10})
        with open(folder / "metrics.json", "a") as f:
            f.write(row + chr(10))
        write_progress(str(folder / "progress.json"), Progress(10 * i, 30, 100.0 * (3 - i)))
        if word[6:]:
            wait_for(os.path.join(word[6:], folder.name + "-" + str(i)))
        else:
            time.sleep(0.8)
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

    def wait(self, seconds: float = 600) -> dict[str, str]:
        """Wait until nothing can run any more, and return the states."""
        end = time.monotonic() + seconds
        while status.status_text(str(self.folder))[1]:
            assert time.monotonic() < end, status.status_text(str(self.folder))[0]
            time.sleep(0.2)
        return self.states()

    def states(self) -> dict[str, str]:
        cluster = Cluster(kind="local")
        return jobs.states(self.plan, lambda: jobs.live_jobs(cluster, str(self.folder)))

    def noted(self) -> list[tuple]:
        """What ran: start or end, run, time, threads and GPUs."""
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        rows = [json.loads(line) for line in lines]
        return [(what, Path(product).parent.name, *rest) for what, product, *rest in rows]

    def until(self, condition, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    made = Sweeps(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(submission, "take_snapshot", lambda folder, packages: str(made.code))
    yield made
    if (made.folder / "sweep.json").exists():
        local.cancel_local(str(made.folder))
