"""Starts, cancellations and edits of a sweep that meet each other half-way."""

import threading
import time

import pytest

from region_pretrain.jobs import slurm
from region_pretrain.lease import hold
from region_pretrain.sweeps import jobs, local, state, submission


@pytest.fixture
def half_submitted(start, queue, sweeps, monkeypatch):
    """The start was interrupted after sbatch had accepted the second job."""
    submit = queue.submit

    def interrupted(runs, sweep, folder, name, after=()):
        submit(runs, sweep, folder, name, after)
        (sweeps.folder / "jobs").mkdir(exist_ok=True)
        (sweeps.folder / f"jobs/{len(queue.submitted)}_submitted.pkl").touch()
        if queue.submitted == ["pre", "det"]:
            (sweeps.folder / "runs/det/run.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "submit_runs", interrupted)
    queue.users[""]["99"] = "RUNNING"  # of the same user, but not of the sweep
    with pytest.raises(KeyboardInterrupt):
        start()
    assert queue.users[""] == {"1": "PENDING", "2": "PENDING", "99": "RUNNING"}

    looks = []

    def jobs_of(user=""):
        """A cancelled job that runs saves a checkpoint, and leaves the queue after two looks."""
        looks.append(len(queue.cancelled) and len(queue.submitted) == 2)
        if sum(looks) > 2:
            for job in queue.cancelled:
                queue.users[""].pop(job, None)
        return dict(queue.users[""])

    monkeypatch.setattr(slurm, "jobs_of", jobs_of)


def test_a_job_that_was_submitted_but_not_recorded_is_cancelled(half_submitted, queue, sweeps):
    assert submission.cancel(str(sweeps.folder)) == ["pre", "job 2"]
    assert queue.cancelled == ["1", "2"]


def test_a_job_that_was_not_recorded_is_not_submitted_twice(half_submitted, start, queue):
    said = start()
    assert said[0] == "cancelling 1 jobs of an interrupted start: 2"
    assert said[1] == "waiting for 1 cancelled jobs to end"
    assert queue.submitted == ["pre", "det", "det"] and queue.cancelled == ["2"]
    assert queue.users[""] == {"1": "PENDING", "3": "PENDING", "99": "RUNNING"}


def test_a_sweep_is_not_cancelled_while_it_is_being_started(start, queue, sweeps):
    """What the start submits afterwards would stay in the queue."""
    start()
    found = []
    other = threading.Thread(target=lambda: found.append(submission.cancel(str(sweeps.folder))))
    with hold(str(sweeps.folder), jobs.START_LEASE):
        other.start()
        time.sleep(1)
        assert not found and not queue.cancelled
    other.join()
    assert found == [["pre", "det"]] and queue.cancelled == ["1", "2"]


def test_a_start_resumes_a_run_that_is_still_being_cancelled(sweeps, tmp_path, monkeypatch):
    sweeps.add("saves", word=f"save:{tmp_path / 'saved'}")  # takes two seconds
    sweeps.start()
    sweeps.until(lambda: sweeps.noted())

    def interrupted(live, say):
        local._signal(live(), local.signal.SIGTERM)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local, "_stop_jobs", interrupted)
        submission.cancel(str(sweeps.folder))
    said: list[str] = []
    submission.start(sweeps.file(), str(sweeps.folder), said.append)
    assert said[0] == "waiting for 1 cancelled jobs to end" and (tmp_path / "saved").exists()
    sweeps.until(lambda: len(sweeps.noted()) == 2)
    assert sweeps.states() == {"saves": state.RUNNING}


def test_jobs_that_have_left_the_plan_still_use_their_gpus(sweeps, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    sweeps.add("a", word=f"wait:{tmp_path / 'go'}")
    sweeps.start(1)
    sweeps.until(lambda: sweeps.noted())
    sweeps.plan.runs.clear()
    for name in "bc":
        sweeps.add(name, word=f"wait:{tmp_path / 'go'}")
    sweeps.start(2)
    sweeps.until(lambda: len(sweeps.noted()) == 2)
    time.sleep(3)  # the next would be started within a second
    assert [row[1:2] + row[4:] for row in sweeps.noted()] == [("a", "3"), ("b", "5")]
    (tmp_path / "go").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}


@pytest.mark.parametrize(
    ("count", "busy", "group"),
    [
        (2, [], "0,1"),
        (2, ["0"], "2,3"),
        (2, ["1", "3"], "0,2"),
        (2, ["0", "1", "2"], "2,3"),
        (1, ["0", "1", "2", "3", "1"], "0"),
        (3, ["1"], "0,2,3"),
        (4, [], "0,1,2,3"),
    ],
)
def test_the_gpus_that_the_fewest_jobs_use(count, busy, group):
    with local._on_free_gpus(["0", "1", "2", "3"], count, busy) as found:
        assert found == group
