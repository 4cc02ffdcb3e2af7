"""Runs of a sweep on this machine: order, cores, failures, and resuming after a kill."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from region_pretrain.commands.sweep import main
from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import jobs, local, state, status, submission


def test_no_more_runs_at_once_than_asked_for(sweeps, tmp_path):
    for name in "abcd":
        sweeps.add(name, word=f"wait:{tmp_path / 'go'}")
    sweeps.start(2)
    sweeps.until(lambda: len(sweeps.noted()) == 2)
    time.sleep(3)  # the next are started within a second
    assert len(sweeps.noted()) == 2
    (tmp_path / "go").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}
    running = most = 0
    for what, *_ in sorted(sweeps.noted(), key=lambda row: row[2]):
        running += 1 if what == "start" else -1
        most = max(most, running)
    assert most == 2


def test_order_and_cores(sweeps):
    for name in "ab":
        sweeps.add(name)
    sweeps.add("c", "a")
    sweeps.add("d", "a", "b")
    sweeps.start(2)
    assert set(sweeps.wait().values()) == {state.FINISHED}
    noted = sweeps.noted()
    at = {(what, name): time for what, name, time, *_ in noted}
    assert len(noted) == len(at) == 8  # each ran once
    assert at["start", "c"] > at["end", "a"]
    assert at["start", "d"] > max(at["end", "a"], at["end", "b"])
    cores = len(os.sched_getaffinity(0))
    assert {row[3] for row in noted} == {str(max(1, cores // 2))}


def test_jobs_that_run_at_once_use_different_gpus(sweeps, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-7")
    for name in "abcd":
        sweeps.add(name, word=f"wait:{tmp_path / 'go'}")
    sweeps.start(4)
    sweeps.until(lambda: len(sweeps.noted()) == 4)
    used = sorted(row[4] for row in sweeps.noted())
    assert used in [sorted(["3", "5", "GPU-7", extra]) for extra in ("3", "5", "GPU-7")]
    (tmp_path / "go").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}


def test_jobs_of_several_gpus_have_a_process_for_each(sweeps, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7,9")
    for name in "ab":
        sweeps.add(name, word=f"wait:{tmp_path / 'go'}")
    cluster = Cluster(kind="local", jobs=2, gpus_per_node=2)
    sweep = dataclasses.replace(sweeps.file(), cluster=cluster)
    submission.start(sweep, str(sweeps.folder), lambda line: None)
    sweeps.until(lambda: len(sweeps.noted()) == 4)
    used = [sorted({row[4] for row in sweeps.noted() if row[1] == name}) for name in "ab"]
    assert sorted(used) == [["3,5"], ["6,7"]]
    (tmp_path / "go").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}


def test_fine_tunings_with_fewer_gpus_than_pre_trainings(sweeps, tmp_path, monkeypatch):
    """As many run at once as have place, and none overtakes a pre-training that waits for it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    for name in "ab":
        sweeps.add(name, word=f"wait:{tmp_path / 'pretrain'}")
    for name in "cdef":
        sweeps.add(name, "a", word=f"wait:{tmp_path / 'finetune'}")
    cluster = Cluster(kind="local", jobs=1, gpus_per_node=3, finetune={"gpus_per_node": 1})
    sweep = dataclasses.replace(sweeps.file(), cluster=cluster)
    submission.start(sweep, str(sweeps.folder), lambda line: None)

    def used(what, names):
        rows = [row for row in sweeps.noted() if row[0] == what and row[1] in names]
        return sorted((row[1], row[4]) for row in rows)

    sweeps.until(lambda: len(used("start", "ab")) == 3)  # three processes
    time.sleep(3)  # the next are started within a second
    assert {gpus for _, gpus in used("start", "abcdef")} == {"3,5,6"}
    assert len(used("start", "abcdef")) == 3
    (tmp_path / "pretrain").touch()
    sweeps.until(lambda: len(used("start", "cdef")) == 3)
    assert len(used("end", "ab")) == 6  # both before the first fine-tuning
    time.sleep(3)
    assert used("start", "cdef") == [("c", "3"), ("d", "5"), ("e", "6")]
    (tmp_path / "finetune").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}
    ((_, last),) = used("start", "f")
    assert last in ("3", "5", "6")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus-per-job 5", "--gpus-per-job 5: this machine has 4 GPUs"),
        ("--gpus-per-job 0", "--gpus-per-job 0: this machine has 4 GPUs"),
        (
            "--gpus-per-job 2 --slurm partition=gpu",
            "--gpus-per-job works with --cluster local only; for slurm, use --slurm "
            "gpus-per-node=N",
        ),
        ("--gpus-per-finetuning 5", "--gpus-per-finetuning 5: this machine has 4 GPUs"),
        (
            "--gpus-per-finetuning 2 --slurm partition=gpu",
            "--gpus-per-finetuning works with --cluster local only; for slurm, use --slurm "
            "finetune.gpus-per-node=N",
        ),
        (
            "--gpus-per-finetuning 3 --jobs 2",
            "cluster finetune has 3 processes, all jobs together 2",
        ),
    ],
)
def test_the_number_of_gpus_per_job(words, message, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    described = []
    monkeypatch.setattr(submission, "describe", lambda _, cluster, __: described.append(cluster))
    monkeypatch.setattr(submission, "dry_run", lambda *_: "")
    start = ["--config", "configs/sweeps/demo.py", "--dry-run"]
    main([*start, "--gpus-per-job", "4", "--jobs", "1"])
    main([*start, "--gpus-per-job", "4", "--gpus-per-finetuning", "2"])
    whole = Cluster(kind="local", jobs=1, gpus_per_node=4)
    assert described == [whole, dataclasses.replace(whole, finetune={"gpus_per_node": 2})]
    with pytest.raises(SystemExit):
        main([*start, *words.split()])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_failure_blocks_only_its_dependants_and_can_be_started_again(sweeps, tmp_path):
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
    assert "bad failed; these runs depend on it: after_bad, after_that\n  error: no data" in text
    before = len(sweeps.noted())
    sweeps.start()
    assert set(sweeps.wait().values()) == {state.FINISHED}
    again = [name for what, name, *_ in sweeps.noted()[before:] if what == "start"]
    assert again == ["bad", "after_bad", "after_that"]  # and nothing that was finished
    assert state.read_record(sweeps.plan.runs["bad"]).submitted == 2
    assert state.read_record(sweeps.plan.runs["good"]).submitted == 1
    sweeps.start()  # nothing to do
    assert len(sweeps.noted()) == before + 6


def test_a_failed_run_waits_only_once_the_sweep_names_the_new_code(sweeps, monkeypatch):
    sweeps.add("bad")
    (run,) = sweeps.plan.runs.values()
    state.claim(str(sweeps.folder), "mine")
    state.write_record(run, state.Record(1, ["1"]))
    seen, write = [], state.write_sweep

    def write_sweep(folder, sweep):
        seen.append(state.read_record(run).job_ids)
        write(folder, sweep)

    monkeypatch.setattr(state, "write_sweep", write_sweep)
    monkeypatch.setattr(local, "start_coordinator", lambda folder: None)
    sweeps.start()
    assert seen == [["1"]] and state.read_record(run) == state.Record(1)


def test_a_coordinator_submits_nothing_with_the_code_of_an_earlier_start(sweeps, monkeypatch):
    sweeps.add("bad")
    old, folder = sweeps.file(), str(sweeps.folder)
    new = dataclasses.replace(old, root="/new")
    versions, roots = [old, new, new, new], []

    def submit_runs(runs, sweep, *_, **__):
        roots.append(sweep.root)
        Path(runs[0].folder).mkdir(parents=True)
        Path(runs[0].product).touch()
        return {run.id: [] for run in runs}

    monkeypatch.setattr(state, "read_sweep", lambda _: versions.pop(0) if versions else new)
    monkeypatch.setattr(local.jobs, "submit_runs", submit_runs)
    monkeypatch.setattr(local, "_POLL_SECONDS", 0.01)
    local._work(folder)
    assert roots == ["/new"]


def test_a_restarted_coordinator_continues_with_the_jobs_of_the_killed_one(sweeps, tmp_path):
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


def test_a_restarted_coordinator_knows_the_gpus_of_running_jobs(sweeps, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for name in "ab":
        sweeps.add(name, word=f"wait:{tmp_path / 'go'}")
    sweeps.start(1)
    sweeps.until(lambda: sweeps.noted())
    os.kill(local.coordinator_pid(str(sweeps.folder)), signal.SIGKILL)
    sweeps.until(lambda: local.coordinator_pid(str(sweeps.folder)) is None)
    sweeps.start(2)
    sweeps.until(lambda: len(sweeps.noted()) == 2)
    assert [row[4] for row in sweeps.noted()] == ["3", "5"]
    (tmp_path / "go").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}


def test_a_folder_that_is_reached_by_two_paths_is_one_sweep(sweeps, tmp_path):
    link = tmp_path / "link to it"
    sweeps.folder.mkdir()
    link.symlink_to(sweeps.folder)
    sweeps.add("long", word=f"wait:{tmp_path / 'gate'}")
    submission.start(sweeps.file(), str(link), lambda line: None)
    sweeps.until(lambda: sweeps.noted())
    assert sweeps.states() == {"long": state.RUNNING}
    assert submission.cancel(str(sweeps.folder)) == ["long"]
    assert not jobs.live_jobs(Cluster(kind="local"), str(link))


def test_cancelled_runs_stop_and_can_be_started_again(sweeps, tmp_path):
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


def test_a_cancelled_run_saves_before_it_ends(sweeps, tmp_path, monkeypatch):
    sweeps.add("saves", word=f"save:{tmp_path / 'saved'}")
    sweeps.add("stuck", word=f"wait:{tmp_path / 'never'}")
    sweeps.start()
    sweeps.until(lambda: len(sweeps.noted()) == 2)
    said: list[str] = []
    monkeypatch.setattr(local, "_SAY_SECONDS", 0.0)
    assert submission.cancel(str(sweeps.folder), said.append) == ["saves", "stuck"]
    assert (tmp_path / "saved").exists()
    assert said and said[-1].startswith("waiting up to 1") and "to save their check" in said[-1]
    assert set(sweeps.states().values()) == {state.CANCELLED}
    (attempt,) = state.attempts(sweeps.plan.runs["saves"])
    assert attempt["outcome"] == "stopped"
    assert not jobs.live_jobs(Cluster(kind="local"), str(sweeps.folder))


def test_a_run_that_does_not_end_is_stopped(sweeps, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "ENDING_SECONDS", 0.5)
    sweeps.add("saves", word=f"save:{tmp_path / 'saved'}")
    sweeps.start()
    sweeps.until(lambda: sweeps.noted())
    said: list[str] = []
    assert submission.cancel(str(sweeps.folder), said.append) == ["saves"]
    assert said == ["stopping 1 jobs that have not ended"]
    assert not (tmp_path / "saved").exists()
    assert not jobs.live_jobs(Cluster(kind="local"), str(sweeps.folder))


def test_a_job_that_was_not_recorded_is_cancelled(sweeps, tmp_path):
    sweeps.add("long", word=f"wait:{tmp_path / 'never'}")
    sweeps.start()
    sweeps.until(lambda: sweeps.noted())
    record = state.read_record(sweeps.plan.runs["long"])
    os.kill(local.coordinator_pid(str(sweeps.folder)), signal.SIGKILL)  # it would start it again
    sweeps.until(lambda: local.coordinator_pid(str(sweeps.folder)) is None)
    os.remove(Path(sweeps.plan.runs["long"].folder, "run.json"))
    assert submission.cancel(str(sweeps.folder)) == [f"job {record.job_ids[0]}"]
    assert not jobs.live_jobs(Cluster(kind="local"), str(sweeps.folder))


def test_debug_runs_one_job_after_the_other_in_this_process(sweeps, tmp_path):
    sweeps.add("bad", word=f"fail_once:{tmp_path / 'tried'}")
    sweeps.add("after_bad", "bad")
    sweeps.add("good")
    said = []
    sweep = dataclasses.replace(sweeps.file(), cluster=Cluster(kind="debug"))
    submission.start(sweep, str(sweeps.folder), said.append)
    assert [name for what, name, *_ in sweeps.noted() if what == "end"] == ["good"]
    assert "[after_bad] cannot start: a run that it depends on has failed" in said
    assert sweeps.states() == {"bad": "failed", "after_bad": "blocked", "good": "finished"}
    submission.start(sweep, str(sweeps.folder), said.append)
    ended = [name for what, name, *_ in sweeps.noted() if what == "end"]
    assert ended == ["good", "bad", "after_bad"]


def test_the_folder_must_be_new_or_belong_to_the_sweep(sweeps, tmp_path):
    sweeps.add("a")
    state.claim(str(sweeps.folder), "other")
    state.write_sweep(str(sweeps.folder), sweeps.file(name="other"))
    with pytest.raises(UserError, match="belongs to the sweep other, not to mine"):
        sweeps.start()
    assert not sweeps.noted()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(UserError, match="is not empty and contains no sweep"):
        state.claim(str(tmp_path / "full"), "mine")
    with pytest.raises(UserError, match="contains no sweep"):
        status.status_text(str(tmp_path / "full"))
    (tmp_path / "killed/code").mkdir(parents=True)  # by a start that was killed
    state.claim(str(tmp_path / "killed"), "mine")


def test_runs_that_slurm_cancelled_after_a_failure_are_blocked(sweeps):
    sweeps.add("a")
    sweeps.add("b", "a")
    sweeps.add("c", "b")
    for name in "abc":  # all were submitted, and none is still in the queue
        state.write_record(sweeps.plan.runs[name], state.Record(1, [f"7_{name}"], []))
    assert sweeps.states() == {"a": state.FAILED, "b": state.BLOCKED, "c": state.BLOCKED}
    Path(sweeps.plan.runs["a"].product).touch()
    assert sweeps.states() == {"a": state.FINISHED, "b": state.FAILED, "c": state.BLOCKED}


def test_jobs_that_have_left_the_plan_are_named_and_stopped(sweeps, tmp_path):
    for name in "ab":
        sweeps.add(name, word=f"wait:{tmp_path / 'never'}")
    sweeps.start(2)
    sweeps.until(lambda: len(sweeps.noted()) == 2)
    sweeps.plan.runs.pop("b")
    said: list[str] = []
    submission.start(sweeps.file(2), str(sweeps.folder), said.append)
    assert any("no longer contains them: b; to stop them" in line for line in said)
    assert sorted(submission.cancel(str(sweeps.folder))) == ["a", "b"]
    assert not jobs.live_jobs(Cluster(kind="local"), str(sweeps.folder))


def test_cancel_signals_no_process_but_the_sweeps_own(sweeps, monkeypatch):
    """Ids in records and queues may be those of any process."""
    sweeps.add("a")
    sweeps.start()
    sweeps.wait()
    while jobs.local_jobs(str(sweeps.folder)):  # the controller ends shortly after its job
        time.sleep(0.05)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        monkeypatch.setattr(jobs, "live_jobs", lambda *_: {str(other.pid): state.RUNNING})
        state.write_record(sweeps.plan.runs["a"], state.Record(1, [str(other.pid)]))
        assert local.cancel_local(str(sweeps.folder)) == []
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0
