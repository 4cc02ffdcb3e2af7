"""Runs on a real SLURM of two nodes on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from slurm_runs import ROOT, in_step, is_over, metrics, outcomes, submit, wait_until

from region_pretrain.errors import UserError
from region_pretrain.jobs.attempts import read_attempts
from region_pretrain.jobs.cluster import Cluster, check_cluster
from region_pretrain.jobs.executor import submit as submit_jobs
from region_pretrain.jobs.job import ToolJob
from region_pretrain.jobs.rendezvous import port
from region_pretrain.jobs.slurm import jobs_of, waiting_reasons

pytestmark = pytest.mark.slurm

TWO = "partition=low,nodes=2,tasks-per-node=1,cpus-per-task=1,mem=1G"
HERE = Path(__file__).parent
SLOW = ("train.hooks.0.seconds=1.0",)


def run_here(tool, config, folder, *overrides, processes=1):
    """The same run without SLURM."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--config-file", str(HERE / config)]
        + ["--num-gpus", str(processes), f"train.output_dir={folder}", *overrides],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def wait_to_end(folder):
    wait_until(lambda: is_over(folder), folder)


def same_run(run, reference):
    """All losses, each iteration logged once, and the final weights are bitwise equal."""
    assert metrics(run) == metrics(reference)
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (run, reference))
    for part in ("model", "pretraining"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


@pytest.fixture(scope="module")
def reference(slurm, tmp_path_factory):
    """The uninterrupted pre-training run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return run_here("pretrain_net.py", "tiny_pretrain.py", folder, processes=2)


def test_bad_input_is_refused_before_submission(slurm, tmp_path):
    with pytest.raises(UserError, match="no partition 'lo' in this cluster; there is low"):
        check_cluster(Cluster(partition="lo"))
    check_cluster(Cluster(partition="low"))
    with pytest.raises(UserError, match="total_batch_size=8 must be a multiple of the 3 processes"):
        submit("pretrain_net.py", "tiny_pretrain.py", "tasks-per-node=3", tmp_path / "run")
    with pytest.raises(UserError, match="sbatch refuses the job run: Memory specification"):
        submit("pretrain_net.py", "tiny_pretrain.py", "mem=900T", tmp_path / "run")
    assert subprocess.check_output(["squeue", "--noheader"]) == b""


def test_the_reason_that_a_job_waits(slurm):
    command = ["sbatch", "--parsable", "--partition=low", "--hold", "--output=/dev/null"]
    job = subprocess.check_output([*command, "--wrap=true"], text=True).strip()
    try:
        assert jobs_of() == {job: "PENDING"} and waiting_reasons() == {job: "JobHeldUser"}
    finally:
        subprocess.run(["scancel", job], check=True)
    wait_until(lambda: not jobs_of(), HERE, 60)


def test_two_nodes_of_two_tasks_train_as_one_process(slurm, tmp_path, monkeypatch):
    who = tmp_path / "who"
    who.mkdir()
    monkeypatch.setenv("WHO_FOLDER", str(who))
    model = ["model.noise=0.0", "model.norm=SyncBN", "train.max_iter=12"]
    settings = "partition=low,nodes=2,tasks-per-node=2,time=10"
    command = [sys.executable, str(ROOT / "tools/pretrain_net.py"), "--slurm", settings]
    command += ["--config-file", str(HERE / "tiny_pretrain.py")]
    command += [f"train.output_dir={tmp_path / 'four'}", *model]
    output = subprocess.check_output(command, text=True)
    assert "submitted" in output and "log: " in output
    one = run_here("pretrain_net.py", "tiny_pretrain.py", tmp_path / "one", *model)
    wait_to_end(tmp_path / "four")
    a, b = metrics(one), metrics(tmp_path / "four")
    assert len(a) == len(b) == 12
    for x, y in zip(a, b, strict=True):
        for name in ("total_loss", "loss_main", "loss_l2", "lr"):
            assert y[name] == pytest.approx(x[name], rel=1e-4), (x["iteration"], name)
    # Four processes run the code as it was when the job was submitted.
    ranks = [json.loads(path.read_text()) for path in who.glob("[0-9]*-0-*")]
    assert len(ranks) == len({rank["pid"] for rank in ranks}) == 4
    assert all(r["code"].startswith(str(tmp_path / "four/slurm/code/")) for r in ranks)


def test_a_killed_process_and_a_killed_task_cost_an_attempt_each(reference, tmp_path, monkeypatch):
    who = tmp_path / "who"
    who.mkdir()
    monkeypatch.setenv("WHO_FOLDER", str(who))
    folder = tmp_path / "run"
    slow = [*SLOW, "train.hooks.0.count=2"]
    job = submit("pretrain_net.py", "tiny_pretrain.py", TWO, folder, *slow)
    wait_until(in_step(folder, 2), folder)
    os.kill(json.loads((who / f"{job}-0-1").read_text())["pid"], signal.SIGKILL)
    wait_until((who / f"{job}-1-0").exists, folder)
    time.sleep(1)
    os.kill(json.loads((who / f"{job}-1-0").read_text())["parent"], signal.SIGKILL)
    wait_to_end(folder)
    assert outcomes(folder) == ["killed", "killed", "finished"]
    same_run(folder, reference)


def test_preemption_by_a_job_of_a_higher_partition(reference, tmp_path):
    folder = tmp_path / "run"
    submit("pretrain_net.py", "tiny_pretrain.py", TWO, folder, *SLOW)
    wait_until(in_step(folder, 2), folder)
    both_nodes = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    subprocess.run(["sbatch", *both_nodes, "--wrap=sleep 1"], check=True, capture_output=True)
    wait_to_end(folder)
    assert outcomes(folder) == ["stopped", "finished"]
    assert read_attempts(folder)[1]["start"] >= "model_0000002.pth"  # saved when it was signalled
    same_run(folder, reference)


def test_fine_tuning_with_loader_workers_survives_a_manual_requeue(slurm, tmp_path):
    reference = run_here("train_net.py", "tiny_finetune.py", tmp_path / "reference", processes=2)
    folder = tmp_path / "run"
    job = submit("train_net.py", "tiny_finetune.py", TWO, folder, *SLOW)
    wait_until(in_step(folder, 5), folder)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_to_end(folder)
    assert outcomes(folder) == ["stopped", "finished"]
    assert read_attempts(folder)[1]["start"] >= "model_0000005.pth"
    same_run(folder, reference)
    assert (folder / "results.json").read_text() == (reference / "results.json").read_text()


def test_a_killed_loader_worker_costs_an_attempt(slurm, tmp_path, monkeypatch):
    """As when memory runs out: the run's own process is not killed, and exits with one line."""
    reference = run_here("train_net.py", "tiny_finetune.py", tmp_path / "reference", processes=2)
    who, folder = tmp_path / "who", tmp_path / "run"
    who.mkdir()
    monkeypatch.setenv("WHO_FOLDER", str(who))
    job = submit("train_net.py", "tiny_finetune.py", TWO, folder, *SLOW)
    wait_until(in_step(folder, 5), folder)
    pid = json.loads((who / f"{job}-0-1").read_text())["pid"]
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    wait_to_end(folder)
    assert outcomes(folder) == ["killed", "finished"]
    logs = [path.read_text(errors="replace") for path in folder.glob("slurm/*_log.out")]
    assert sum(text.count("error: DataLoader worker ") for text in logs) == 1
    same_run(folder, reference)


def test_a_port_in_use_costs_an_attempt(reference, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    job = submit("pretrain_net.py", "tiny_pretrain.py", f"{TWO},+hold", folder)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with socket.socket() as s:
        s.bind(("", port(job)))
        s.listen()
        subprocess.run(["scontrol", "release", job], check=True)
        wait_until(lambda: [a for a in read_attempts(folder) if "outcome" in a], folder)
    wait_to_end(folder)
    assert outcomes(folder) == ["killed", "finished"]
    log = next(folder.glob("slurm/*_0_log.out")).read_text(errors="replace")
    assert log.count("error: rank 0 cannot listen on port ") == 1
    same_run(folder, reference)


def test_a_throttled_array_and_its_dependents(slurm, tmp_path):
    (tmp_path / "code/tools").mkdir(parents=True)
    shutil.copy(ROOT / "tests/jobs/fake_tool.py", tmp_path / "code/tools/tool.py")

    def make(name, how):
        (tmp_path / name).mkdir()
        folder = str(tmp_path / name)
        return ToolJob("tools/tool.py", [how, folder], folder, str(tmp_path / "code"))

    def submit_here(jobs, name, after=()):
        cluster = Cluster(partition="low", array_parallelism=2)
        return [job.job_id for job in submit_jobs(jobs, cluster, f"{tmp_path}/jobs", name, after)]

    ids = submit_here([make(how, how) for how in ("well", "killed", "signalled")], "array")
    assert ids == [f"{ids[0].split('_')[0]}_{i}" for i in range(3)]
    (wrong,) = submit_here([make("wrong", "wrong")], "wrong")
    submit_here([make("after", "well")], "after", ids)
    submit_here([make("never", "well")], "never", [ids[0], wrong])

    wait_until(lambda: not subprocess.check_output(["squeue", "--noheader"]), tmp_path)
    assert outcomes(tmp_path / "well") == outcomes(tmp_path / "after") == ["finished"]
    assert outcomes(tmp_path / "killed") == ["killed", "finished"]
    assert outcomes(tmp_path / "signalled") == ["stopped", "finished"]
    assert outcomes(tmp_path / "wrong") == ["failed"] and outcomes(tmp_path / "never") == []
    names = ("well", "killed", "signalled")
    ends = [read_attempts(f"{tmp_path}/{name}")[-1]["ended"] for name in names]
    assert read_attempts(f"{tmp_path}/after")[0]["started"] > max(ends)


def test_a_job_submitted_inside_an_allocation_gets_its_own_resources(slurm, tmp_path, monkeypatch):
    # srun refuses these: more tasks and cores than the job has, and two kinds of memory
    inherited = {"SLURM_JOB_ID": "999", "SLURM_NTASKS": "64", "SLURM_CPUS_PER_TASK": "64"}
    inherited |= {"SLURM_NPROCS": "64", "SLURM_TRES_PER_TASK": "cpu=64", "SLURM_NNODES": "9"}
    inherited |= {"SLURM_MEM_PER_CPU": "9", "SLURM_MEM_PER_NODE": "9", "SLURM_RESTART_COUNT": "4"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "well"
    folder.mkdir()
    (tmp_path / "code/tools").mkdir(parents=True)
    shutil.copy(ROOT / "tests/jobs/fake_tool.py", tmp_path / "code/tools/tool.py")
    job = ToolJob("tools/tool.py", ["well", str(folder)], str(folder), str(tmp_path / "code"))
    submit_jobs([job], Cluster(partition="low"), f"{tmp_path}/jobs", "inside")
    for name in inherited:
        monkeypatch.delenv(name)
    wait_until(lambda: not subprocess.check_output(["squeue", "--noheader"]), tmp_path)
    assert outcomes(folder) == ["finished"]
    assert [attempt["restart"] for attempt in read_attempts(str(folder))] == [0]
    assert len((folder / "seen0").read_text().splitlines()) == 1


def test_a_job_whose_step_ended_is_requeued_and_a_cancelled_one_is_not(slurm, tmp_path):
    (tmp_path / "code/tools").mkdir(parents=True)
    shutil.copy(ROOT / "tests/jobs/fake_tool.py", tmp_path / "code/tools/tool.py")
    cluster = Cluster(partition="low", nodes=2, tasks_per_node=1)
    ids = {}
    for name in ("step", "job"):
        (tmp_path / name).mkdir()
        folder = str(tmp_path / name)
        job = ToolJob("tools/tool.py", ["deaf", folder], folder, str(tmp_path / "code"))
        ids[name] = submit_jobs([job], cluster, f"{tmp_path}/jobs", name)[0].job_id

    def signalled(name):
        paths = tmp_path.glob(f"jobs/tasks/{ids[name]}_0_*.json")
        states = [json.loads(path.read_text() or "{}").get("state") for path in paths]
        return states == ["signalled"] * 2

    for name in ids:
        wait_until(lambda n=name: len(list((tmp_path / n).glob("seen*"))) == 2, tmp_path)
    # As SLURM does if a node or srun does not answer: it terminates all tasks, then kills them.
    subprocess.run(["scancel", "--signal=TERM", f"{ids['step']}.0"], check=True)
    subprocess.run(["scancel", ids["job"]], check=True)
    wait_until(lambda: signalled("step") and signalled("job"), tmp_path)
    subprocess.run(["scancel", "--signal=KILL", f"{ids['step']}.0"], check=True)
    wait_until(lambda: not subprocess.check_output(["squeue", "--noheader"]), tmp_path)
    assert outcomes(tmp_path / "step") == ["killed", "finished"]
    (attempt,) = read_attempts(str(tmp_path / "job"))
    assert "outcome" not in attempt


def test_a_failure_is_reported_with_its_rank_and_not_requeued(slurm, tmp_path):
    folder = tmp_path / "broken"
    breaking = "train.hooks=[{_target_: slurm_runs.BreakAt, iteration: 3, rank: 1}]"
    submit("pretrain_net.py", "tiny_pretrain.py", TWO, folder, breaking)
    wait_to_end(folder)
    (attempt,) = read_attempts(folder)
    assert attempt["outcome"] == "failed"
    assert f"tools/pretrain_net.py for {folder} failed on rank 1 of 2" in attempt["error"]
    assert "ValueError: the weather is bad" in attempt["error"]


def test_the_time_limit(reference, tmp_path):
    folder = tmp_path / "run"
    limit = ",time=10,signal-seconds=120"
    job = submit("pretrain_net.py", "tiny_pretrain.py", TWO + limit, folder, *SLOW)
    wait_until(in_step(folder, 2), folder)
    # Shorten the wait: SLURM signals the job two minutes before the limit, which is now.
    subprocess.run(["scontrol", "update", f"job={job}", "TimeLimit=2"], check=True)
    wait_until(lambda: "outcome" in read_attempts(str(folder))[0], folder)
    subprocess.run(["scontrol", "update", f"job={job}", "TimeLimit=10"], check=True)
    wait_to_end(folder)
    assert outcomes(folder) == ["stopped", "finished"]
    assert read_attempts(folder)[1]["start"] >= "model_0000002.pth"
    same_run(folder, reference)
