"""Killed controllers and tasks of a sweep, its damaged files, and another machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from region_pretrain.errors import UserError
from region_pretrain.jobs import requeue
from region_pretrain.jobs.attempts import read_attempts, start_attempt, vanished
from region_pretrain.jobs.child import following_parent
from region_pretrain.lease import PREFIX, Holder, hold
from region_pretrain.metrics import read_results
from region_pretrain.sweeps import jobs, local, state, status, submission
from region_pretrain.sweeps.report import write_sweep_report


def processes_with(text):
    """Process ids by what is in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if text in command.replace("\0", " ") and int(pid) != os.getpid():
            found.append(int(pid))
    return found


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("victim", ["controller", "task"])
def test_a_killed_controller_or_task_ends_its_tool_which_is_started_again(sweeps, tmp_path, victim):
    sweeps.add("long", word=f"wait:{tmp_path / 'gate'}")
    sweeps.add("later", "long")
    sweeps.start()
    sweeps.until(lambda: sweeps.noted())
    (tool,) = processes_with(f"tools/fake.py {'--resume '}{sweeps.plan.runs['long'].product}")
    task = parent_of(tool)
    controller = parent_of(task)
    assert str(controller) in state.read_record(sweeps.plan.runs["long"]).job_ids
    os.kill(controller if victim == "controller" else task, signal.SIGKILL)
    sweeps.until(lambda: len(sweeps.noted()) == 2)  # started again, by itself
    assert tool not in processes_with("tools/fake.py")
    assert len(processes_with(f"tools/fake.py --resume {sweeps.plan.runs['long'].product}")) == 1
    (tmp_path / "gate").touch()
    assert set(sweeps.wait().values()) == {state.FINISHED}
    assert [name for what, name, *_ in sweeps.noted() if what == "end"] == ["long", "later"]
    outcomes = [a["outcome"] for a in read_attempts(sweeps.plan.runs["long"].folder)]
    assert outcomes == ["unknown", "finished"]


def test_a_task_that_is_killed_before_it_records_anything_is_started_again(sweeps, tmp_path):
    sweeps.add("a")
    run, killed = sweeps.plan.runs["a"], tmp_path / "killed"
    (sweeps.code / "sitecustomize.py").write_text(
        "import os, pathlib, sys\n"
        f"killed = pathlib.Path({str(killed)!r})\n"
        "if 'submitit.core._submit' in sys.orig_argv and not killed.exists():\n"
        "    killed.touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    sweeps.start()
    assert sweeps.wait() == {"a": state.FINISHED} and killed.exists()
    # Its product is there before its process has written how it ended.
    sweeps.until(lambda: "outcome" in read_attempts(run.folder)[-1])
    assert [a["outcome"] for a in read_attempts(run.folder)] == ["unknown", "finished"]


def test_a_submission_that_fails_before_it_records_anything_stays_failed(sweeps):
    sweeps.add("a")
    run, folder = sweeps.plan.runs["a"], str(sweeps.folder)
    state.write_record(run, state.Record(1, ["7"], ["log"]))
    (sweeps.folder / "jobs").mkdir()
    (sweeps.folder / "jobs/7_0_result.pkl").touch()
    assert not local._was_killed(run, folder) and read_attempts(run.folder) == []


@pytest.mark.parametrize(
    ("code", "restart", "requeued"), [("137", "0", True), ("1", "0", False), ("137", "10", False)]
)
def test_a_slurm_job_that_is_killed_before_its_first_note_is_requeued(
    tmp_path, monkeypatch, capsys, code, restart, requeued
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    monkeypatch.setattr(sys, "argv", ["requeue", str(tmp_path), code])
    asked = []
    monkeypatch.setattr(requeue.slurm, "requeue", asked.append)
    requeue.main()
    assert asked == ["7"] * requeued
    line = "job 7: a process was killed by signal 9 before it could start; requeueing\n"
    assert capsys.readouterr().out == line * requeued


def test_a_run_that_is_always_killed_fails_in_the_end(tmp_path):
    folder = str(tmp_path)
    sweep_run = state.Run("a", "finetune", "a", "tool", (), folder, "x")
    for i in range(3):
        start_attempt(folder, f"job{i}", 0, "here")
        assert vanished(read_attempts(folder)) == i + 1
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    start_attempt(folder, "job3", 0, "here")  # the third one wrote a checkpoint
    assert vanished(read_attempts(folder)) == 1
    state.write_record(sweep_run, state.Record(4, ["job3"], []))
    assert local._was_killed(sweep_run, folder)
    for i in (4, 5):  # killed before they could record the attempt
        state.write_record(sweep_run, state.Record(i + 1, [f"job{i}"], []))
        assert local._was_killed(sweep_run, folder) == (i == 4)
        assert vanished(read_attempts(folder)) == i - 2


def test_a_task_whose_parent_died_before_it_followed_it_exits():
    code = "import signal, sys; from region_pretrain.jobs.child import following_parent\n"
    code += "following_parent(signal.SIGKILL, 1 << 22)()\nprint('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    following_parent(signal.SIGKILL)  # for a preexec_fn: has no effect yet


def test_two_coordinators_and_two_starts_run_everything_once(sweeps):
    for name in "ab":
        sweeps.add(name)
    threads = [threading.Thread(target=sweeps.start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    local.coordinate(str(sweeps.folder))  # the running one goes on; this one returns at once
    assert set(sweeps.wait().values()) == {state.FINISHED}
    assert sorted(name for what, name, *_ in sweeps.noted() if what == "start") == ["a", "b"]


def test_a_run_that_is_submitted_during_a_look_at_the_sweep_has_not_failed(sweeps):
    """Another process writes its record after this one has listed the running jobs."""
    sweeps.add("a")
    (run,) = sweeps.plan.runs.values()
    live = {}

    def submit_meanwhile():
        live["77"] = state.RUNNING
        state.write_record(run, state.Record(1, ["77"]))
        return {}  # this list was made just before

    assert jobs.states(sweeps.plan, submit_meanwhile) == {"a": state.WAITING}
    assert jobs.states(sweeps.plan, lambda: live) == {"a": state.RUNNING}


def test_a_sweep_of_another_machine_is_left_alone(sweeps):
    sweeps.add("a")
    folder = str(sweeps.folder)
    state.claim(folder, "mine")
    state.write_sweep(folder, sweeps.file())
    state.write_record(sweeps.plan.runs["a"], state.Record(1, ["7"], []))
    before = Path(sweeps.plan.runs["a"].folder, "run.json").read_text()
    there = replace(Holder.this_process(), machine="elsewhere", host="node7")
    (sweeps.folder / PREFIX).mkdir()
    (sweeps.folder / PREFIX / "1").write_text(json.dumps(asdict(there)))
    for command in (sweeps.start, lambda: status.status_text(folder)):
        with pytest.raises(UserError, match=r"is run by process \d+ on node7 since .* use this"):
            command()
    with pytest.raises(UserError, match="on node7"):
        submission.cancel(folder)
    assert Path(sweeps.plan.runs["a"].folder, "run.json").read_text() == before
    (sweeps.folder / PREFIX / "1").unlink()


DAMAGES = {
    "empty": b"",
    "half": None,
    "binary": bytes(range(256)),
    "null": b"null",
    "list": b"[1, 2]",
    "number": b"7",
    "text": b'"x"',
    "dict": b"{}",
    "other": b'{"runs": 3, "name": []}',
    "deep": b"[" * 100_000,
    "huge": b"1" * 10_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line_in_every_command(sweeps, damage):
    sweeps.add("a", word="train")
    run, folder = sweeps.plan.runs["a"], str(sweeps.folder)
    state.claim(folder, "mine")
    state.write_sweep(folder, sweeps.file())
    state.write_record(run, state.Record(1, ["7"], ["log"]))
    start_attempt(run.folder, "7", 0, "here")
    commands = [
        lambda: status.status_text(folder),
        lambda: write_sweep_report(folder),
        sweeps.start,
        lambda: submission.cancel(folder),
    ]
    for path in (f"{folder}/sweep.json", f"{run.folder}/run.json", f"{run.folder}/attempts.json"):
        good = Path(path).read_bytes()
        bad = DAMAGES[damage]
        Path(path).write_bytes(good[: len(good) // 2] if bad is None else bad)
        refused = 0
        for command in commands if path.endswith(("sweep.json", "run.json")) else commands[:2]:
            try:
                command()
            except UserError as error:
                refused += 1
                assert str(error).startswith(f"{path} is damaged"), error
                assert "\n" not in str(error) and "delete it" in str(error)
        # {} is a valid record: the run counts as not submitted
        allowed = damage == "dict" and path.endswith("run.json")
        assert refused or allowed, (path, damage)
        Path(path).write_bytes(good)
        if allowed:
            sweeps.wait()
            return


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_results_are_one_line(tmp_path, damage):
    path = tmp_path / "results.json"
    good = json.dumps({"bbox": {"AP": 1.5, "AP-x": None}}).encode()
    path.write_bytes(good)
    assert read_results(str(tmp_path)) == {"bbox": {"AP": 1.5, "AP-x": None}}
    path.write_bytes(good[:-4] if DAMAGES[damage] is None else DAMAGES[damage])
    if damage == "dict":
        assert read_results(str(tmp_path)) == {}  # nothing was detected
        return
    with pytest.raises(UserError, match="results.json is damaged.*delete it and continue") as error:
        read_results(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_sweep_whose_file_was_deleted_starts_again_and_keeps_finished_runs(sweeps):
    sweeps.add("a")
    sweeps.start()
    sweeps.wait()
    (sweeps.folder / "sweep.json").unlink()
    sweeps.add("b")
    sweeps.start()
    assert set(sweeps.wait().values()) == {state.FINISHED}
    assert [name for what, name, *_ in sweeps.noted() if what == "start"] == ["a", "b"]


def test_a_damaged_note_of_a_task_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/7_0_0.json").write_text("{")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(sys, "argv", ["requeue", str(tmp_path), "1"])
    with pytest.raises(SystemExit):
        requeue.main()
    assert "7_0_0.json is damaged" in capsys.readouterr().err


def test_a_sweeps_folder_is_locked_while_it_is_started(sweeps, monkeypatch):
    sweeps.add("a")
    sweeps.folder.mkdir()
    monkeypatch.setattr(submission, "_PATIENCE_SECONDS", 0.2)
    began = time.monotonic()
    with hold(str(sweeps.folder), f"{PREFIX}-start"), pytest.raises(UserError, match="in use by"):
        sweeps.start()
    assert time.monotonic() - began < 10 and not jobs.live_jobs(
        sweeps.file().cluster, str(sweeps.folder)
    )
