import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from region_pretrain.errors import KILLED, STOPPED, UserError
from region_pretrain.jobs import job, rendezvous, requeue
from region_pretrain.jobs.attempts import MAX_STALLED, end_attempt, read_attempts, start_attempt
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.jobs.executor import sbatch_text, submit
from region_pretrain.jobs.job import ToolJob
from region_pretrain.jobs.snapshot import take_snapshot


@pytest.fixture
def make_job(tmp_path):
    """A job of ``fake_tool.py``: (its behaviour) -> job."""
    (tmp_path / "code/tools").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("fake_tool.py"), tmp_path / "code/tools/tool.py")
    (tmp_path / "run").mkdir()

    def make(how, **fields):
        run = str(tmp_path / "run")
        return ToolJob("tools/tool.py", [how, run], run, str(tmp_path / "code"), **fields)

    return make


LOCAL = Cluster(kind="local")


def run(job, folder, cluster=LOCAL):
    (submitted,) = submit([job], cluster, str(folder / "jobs"), "test")
    return submitted


def seen(folder, rank=0):
    return [json.loads(line) for line in (folder / f"run/seen{rank}").read_text().splitlines()]


def outcomes(folder):
    return [attempt.get("outcome") for attempt in read_attempts(str(folder / "run"))]


def test_a_tool_runs_in_its_own_interpreter_and_place(make_job, tmp_path):
    assert run(make_job("well"), tmp_path).result() == str(tmp_path / "run")
    (attempt,) = seen(tmp_path)
    assert attempt["arguments"] == ["--resume", "well", str(tmp_path / "run")]
    assert attempt["cwd"] == os.getcwd() and attempt["RANK"] is None
    assert outcomes(tmp_path) == ["finished"]


def test_the_debug_executor_runs_it_in_this_shell(make_job, tmp_path):
    job = run(make_job("well"), tmp_path, Cluster(kind="debug"))
    assert outcomes(tmp_path) == []
    assert job.result() == str(tmp_path / "run") and outcomes(tmp_path) == ["finished"]


def test_the_tasks_of_a_job_agree_on_an_address(make_job, tmp_path):
    job = run(make_job("well", resume=""), tmp_path, Cluster(kind="local", tasks_per_node=2))
    job.results()
    ranks = [seen(tmp_path, rank)[0] for rank in range(2)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert ranks[0]["MASTER_ADDR"] == ranks[1]["MASTER_ADDR"] == "127.0.0.1"
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert ranks[0]["arguments"][0] == "well"


def test_cores_are_divided_among_local_jobs(make_job, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    run(make_job("well"), tmp_path, Cluster(kind="local", jobs=4)).result()
    assert seen(tmp_path)[0]["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("how", ["signalled", "signalled-early"])
def test_a_job_that_is_signalled_is_requeued_and_resumes(make_job, tmp_path, how):
    run(make_job(how), tmp_path).result()
    first, second = seen(tmp_path)
    assert second["arguments"] == first["arguments"]
    assert outcomes(tmp_path) == ["stopped", "finished"]


def test_preemptions_near_the_time_limit_do_not_count_as_time_outs(make_job, tmp_path):
    # submitit counts each signal within the last ten minutes as a time-out, and allows three.
    cluster = Cluster(kind="local", time=10)
    assert run(make_job("signalled4"), tmp_path, cluster).result() == str(tmp_path / "run")
    assert outcomes(tmp_path) == ["stopped"] * 4 + ["finished"]


@pytest.mark.parametrize("how", ["killed", "worker"])
def test_a_job_that_lost_a_process_is_started_again(make_job, tmp_path, how):
    job = run(make_job(how), tmp_path)
    job.result()
    assert job.stdout().count("error: DataLoader worker (pid 7) is killed") == (how == "worker")
    assert outcomes(tmp_path) == ["killed", "finished"]


def test_a_failure_is_reported_with_the_end_of_the_log(make_job, tmp_path):
    job = run(make_job("wrong"), tmp_path)
    with pytest.raises(submitit.core.utils.FailedJobError) as failed:
        job.result()
    for text in (f"tools/tool.py for {tmp_path / 'run'} failed", "exit code 2", "no such thing"):
        assert text in str(failed.value)
    (attempt,) = read_attempts(str(tmp_path / "run"))
    assert attempt["outcome"] == "failed" and "no such thing" in attempt["error"]


def test_a_tool_does_not_outlive_its_task(make_job, tmp_path):
    job = run(make_job("slow"), tmp_path)
    path = tmp_path / "run/seen0"
    while not path.exists() or not path.read_text().endswith("\n"):
        time.sleep(0.05)
    os.kill(seen(tmp_path)[0]["parent"], signal.SIGKILL)
    job.wait()
    folder = f"{tmp_path}/run".encode()
    deadline = time.monotonic() + 20
    while any(folder in read_command(pid) for pid in os.listdir("/proc") if pid.isdigit()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_command(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def test_a_job_is_its_own_checkpoint(make_job):
    job = make_job("well")
    again = job.checkpoint()
    assert again.function == job and pickle.loads(pickle.dumps(again)).function == job


def test_the_process_beside_a_tool_does_not_import_pytorch():
    code = "import region_pretrain.jobs.job, region_pretrain.jobs.requeue, sys; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "submitit" in modules and "torch" not in modules


def test_the_command_in_a_container(make_job, tmp_path):
    job = make_job("well", container="apptainer exec --nv 'my image.sif'")
    tool = str(tmp_path / "code/tools/tool.py")
    assert job.command()[:7] == ["apptainer", "exec", "--nv", "my image.sif", "python", "-u", tool]


def test_the_sbatch_file(make_job, tmp_path):
    cluster = Cluster(
        partition="gpu",
        account="me",
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=6,
        time=90,
        mem_gb=1.5,
        setup=["module load cuda"],
        array_parallelism=3,
        extra={"mail-type": "END"},
    )
    job = make_job("well")
    text = sbatch_text([job], cluster, str(tmp_path / "jobs"), "name", after=["12", "13_1"])
    flags = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    for flag in (
        "partition=gpu",
        "account=me",
        "nodes=2",
        "gpus-per-node=8",
        "ntasks-per-node=8",
        "cpus-per-task=6",
        "time=90",
        "mem=1536M",
        "signal=USR2@120",
        "job-name=name",
        "requeue",
        "open-mode=append",
        "mail-type=END",
        "dependency=afterok:12:13_1",
        "kill-on-invalid-dep=yes",
    ):
        assert flag in flags, (flag, text)
    assert not any(flag.startswith("array") for flag in flags)
    lines = text.splitlines()
    assert lines.index("module load cuda") < [i for i, x in enumerate(lines) if "srun" in x][0]
    assert f"export PYTHONPATH={tmp_path}/code${{PYTHONPATH:+:$PYTHONPATH}}" in lines
    text = sbatch_text([job] * 5, Cluster(array_parallelism=3), str(tmp_path / "jobs"), "name")
    assert "#SBATCH --array=0-4%3\n" in text
    assert "--time" not in text  # the partition's own limit, not submitit's five minutes
    with pytest.raises(ValueError, match="the same root"):
        other = ToolJob("tools/tool.py", [], "run", "elsewhere")
        sbatch_text([job, other], Cluster(), str(tmp_path / "jobs"), "name")


def test_consecutive_attempts_without_a_checkpoint_are_counted(make_job, tmp_path):
    folder = str(tmp_path / "run")
    for i in range(MAX_STALLED):
        assert start_attempt(folder, "7", i, "n1") == i
        end_attempt(folder, "killed")
        end_attempt(folder, "finished")  # the first outcome stays
    assert start_attempt(folder, "7", 99, "n1") == MAX_STALLED
    (tmp_path / "run/last_checkpoint").write_text("model_0000009.pth")
    assert start_attempt(folder, "7", 100, "n1") == 0  # the previous one left a checkpoint
    end_attempt(folder, "stopped")
    assert start_attempt(folder, "7", 101, "n1") == 1
    assert start_attempt(folder, "8", 0, "n1") == 0  # submitted again
    assert outcomes(tmp_path) == ["killed"] * MAX_STALLED + ["unknown", "stopped", "unknown", None]


def test_the_parts_of_a_region_search_are_its_progress(tmp_path):
    """It has no checkpoints, but a search may need more time limits than are tolerated."""
    folder, parts = str(tmp_path / "run"), tmp_path / "r.arrow.parts"

    def attempt(end):
        stalled = start_attempt(folder, "7", 0, "n1", str(parts))
        end()
        return stalled

    def write_part():
        parts.mkdir(exist_ok=True)
        (parts / f"part-{len(list(parts.iterdir())):06}.arrow").touch()

    ends = [lambda: end_attempt(folder, "stopped"), lambda: None]
    for i in range(MAX_STALLED + 2):
        assert attempt(lambda i=i: (write_part(), ends[i % 2]())) == 0
    found = [attempt(ends[i % 2]) for i in range(3)]
    assert found == [0, 1, 2]
    (parts / "progress-0.json").touch()
    assert attempt(write_part) == 3 and attempt(write_part) == 0
    assert read_attempts(folder)[1]["start"] == "1 parts"


def test_a_job_fails_after_too_many_attempts_without_a_checkpoint(make_job, tmp_path, monkeypatch):
    class Environment:
        global_rank, num_tasks, job_id, cluster = 0, 1, "7", "slurm"
        paths = submitit.core.utils.JobPaths(tmp_path / "jobs", "7", 0)

    for i in range(MAX_STALLED):
        start_attempt(str(tmp_path / "run"), "7", i, "n1")
    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    with pytest.raises(UserError, match="10 consecutive attempts ended without a new checkpoint"):
        make_job("well")()
    assert outcomes(tmp_path) == ["unknown"] * MAX_STALLED + ["failed"]


def test_a_process_that_lost_a_worker_is_noted_as_killed(make_job, tmp_path, monkeypatch):
    """The batch script reads the note and requeues the job."""

    environment = SimpleNamespace(global_rank=1, num_tasks=2, job_id="7", cluster="slurm")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "jobs"))
    start_attempt(str(tmp_path / "run"), "7", 0, "n1")
    task = job._Task(make_job("well"), environment)
    with pytest.raises(SystemExit) as ended:
        task._conclude(KILLED)
    assert ended.value.code == 128 + signal.SIGKILL and outcomes(tmp_path) == ["killed"]
    note = json.loads(Path(task._note).read_text())
    assert (note["state"], note["code"]) == ("killed", signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_a_tool_that_stops_ends_the_job(make_job, tmp_path, monkeypatch, rank):
    """Such as a full disk at the time limit: with a requeue, it would be met ten times."""
    environment = SimpleNamespace(global_rank=rank, num_tasks=2, job_id="7", cluster="slurm")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "jobs"))
    start_attempt(str(tmp_path / "run"), "7", 0, "n1")
    task = job._Task(make_job("well"), environment)
    task.signalled = signal.SIGUSR2
    with pytest.raises(UserError, match=rf"failed on rank {rank} of 2 \(exit code 2\)"):
        task._conclude(UserError.exit_code)
    assert outcomes(tmp_path) == ["failed"]


@pytest.mark.parametrize("code", [1, -signal.SIGABRT, 128 + signal.SIGABRT])
def test_a_task_that_lost_another_one_is_not_the_cause(make_job, tmp_path, monkeypatch, code):
    environment = SimpleNamespace(global_rank=0, num_tasks=2, job_id="7", cluster="slurm")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "jobs"))
    start_attempt(str(tmp_path / "run"), "7", 0, "n1")
    task = job._Task(make_job("well"), environment)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        # SLURM terminates it, as the other task has failed.
        patch.setattr(job.time, "sleep", lambda _: task._on_signal(signal.SIGTERM, None))
        task._conclude(code)
    assert ended.value.code == STOPPED and outcomes(tmp_path) == [None]
    assert json.loads(Path(task._note).read_text())["state"] == "signalled"
    monkeypatch.setattr(job, "_PEER_FAILURE_SECONDS", 0)
    task.signalled = None
    with pytest.raises((SystemExit, UserError)):
        task._conclude(code)
    assert outcomes(tmp_path) == ["failed" if code == 1 else "killed"]


@pytest.mark.parametrize(
    ("states", "state", "reason"),
    [
        # SLURM gave up the step but not the job.
        (["signalled", "signalled"], "RUNNING", "SLURM ended its step (srun exit code 143)"),
        (["signalled", "signalled"], "COMPLETING", None),  # cancelled
        (["signalled", "signalled"], "", None),  # no longer in the queue
        (["stopped", "signalled"], "COMPLETING", None),  # rank 0 has requeued it
        # SLURM did not answer rank 0.
        (["stopped", "signalled"], "RUNNING", "it stopped, and could not requeue itself"),
        (["signalled", "failed"], "RUNNING", None),
        (["aborted", "failed"], "RUNNING", None),  # by NCCL, since the other one failed
        (["aborted", "signalled"], "COMPLETING", "a process was killed by signal 6"),
        # SLURM terminates the other tasks of the step.
        (["signalled", "killed"], "COMPLETING", "a process was killed by signal 9"),
        # The task was killed before it could write another note.
        (["signalled", "running"], "RUNNING", "a process was killed (srun exit code 143)"),
        ([], "RUNNING", "a process was killed by signal 15 before it could start"),
    ],
)
def test_which_jobs_the_batch_script_requeues(states, state, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / "bin").mkdir()
    answer = f"echo {state}" if state else "echo error: Invalid job id specified >&2; exit 1"
    squeue = f'case "$*" in *--jobs=7_2*) {answer};; *) exit 3;; esac'
    for name, line in {"squeue": squeue, "scontrol": f"echo $* >{tmp_path}/ran"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    start_attempt(str(tmp_path / "run"), "7_2", 1, "n1")
    (tmp_path / "tasks").mkdir()
    for rank, word in enumerate(states):
        code = {"killed": 9, "aborted": signal.SIGABRT}.get(word, 0)
        word = "killed" if code else word
        note = {"state": word, "code": code, "output_dir": str(tmp_path / "run")}
        (tmp_path / f"tasks/7_2_1_{rank}.json").write_text(json.dumps(note))
    monkeypatch.setattr(sys, "argv", ["requeue", str(tmp_path), "143"])
    requeue.main()
    ran = (tmp_path / "ran").read_text() if (tmp_path / "ran").exists() else ""
    assert ran == ("requeue 7_2\n" if reason else "")
    assert [a.get("outcome") for a in read_attempts(str(tmp_path / "run"))] == [
        "killed" if reason and states and "stopped" not in states else None
    ]
    assert capsys.readouterr().out == (f"job 7_2: {reason}; requeueing\n" if reason else "")


def test_each_attempt_uses_another_port(monkeypatch):
    ports = set()
    for job_id in ("7", "8", "9"):
        for restart in range(20):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            ports.add(rendezvous.port(job_id))
            assert rendezvous.port(job_id) in ports and 10000 <= rendezvous.port(job_id) < 32000
    assert len(ports) >= 58  # of 60; two may collide among 22000 ports


def test_a_snapshot_is_unaffected_by_later_edits(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    for name in ("region_pretrain", "projects", "configs", "tools/__pycache__"):
        (checkout / name).mkdir(parents=True)
    (checkout / "tools/tool.py").write_text("print(1)")
    (checkout / "tools/__pycache__/x.pyc").write_text("")
    (checkout / "secret").write_text("")
    monkeypatch.setattr("region_pretrain.jobs.snapshot.ROOT", checkout)
    monkeypatch.setattr("region_pretrain.jobs.snapshot.PACKAGE", checkout / "region_pretrain")
    first = take_snapshot(str(tmp_path / "run"))
    assert take_snapshot(str(tmp_path / "run")) == first
    (checkout / "tools/tool.py").write_text("print(2)")
    second = take_snapshot(str(tmp_path / "run"))
    assert open(f"{first}/tools/tool.py").read() == "print(1)"
    assert open(f"{second}/tools/tool.py").read() == "print(2)"
    assert sorted(os.listdir(first)) == ["tools"] and os.listdir(f"{first}/tools") == ["tool.py"]


def test_a_snapshot_of_a_wheel_has_the_layout_of_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site-packages/region_pretrain"
    files = ["lazy.py", "shipped/__init__.py", "projects/soco/views.py"]
    for name in ("configs/a.py", "tools/train_net.py", "projects/SoCo/configs/b.py"):
        files.append(f"shipped/{name}")
    for name in files:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    (tmp_path / "site-packages/tools").mkdir()  # of another distribution
    (tmp_path / "site-packages/tools/other.py").write_text("")
    monkeypatch.setattr("region_pretrain.jobs.snapshot.ROOT", package / "shipped")
    monkeypatch.setattr("region_pretrain.jobs.snapshot.PACKAGE", package)
    root = Path(take_snapshot(str(tmp_path / "run")))
    found = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert found == {
        *(f"region_pretrain/{name}" for name in files[:3]),
        *(name.removeprefix("shipped/") for name in files[3:]),
    }
