"""SLURM's commands: their answers, their errors, and that only one module runs them."""

import ast
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from region_pretrain.errors import UserError
from region_pretrain.jobs import slurm
from region_pretrain.jobs.attempts import read_attempts
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.jobs.executor import submit
from region_pretrain.jobs.job import ToolJob, _Task

ROOT = Path(__file__).parents[2]
COMMANDS = set("squeue scontrol scancel sinfo sacct sbatch srun salloc sstat sprio".split())
#: The tool runs a separate SLURM.
ALLOWED = ("region_pretrain/jobs/slurm.py", "tools/local_slurm.py")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replace a command with a shell script: (name, script) -> None."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return write


def test_answers(fake, tmp_path):
    # Without it they hide jobs in hidden partitions.
    every = "case $* in *--all*) ;; *) exit 3;; esac; "
    fake("squeue", every + "echo '7_0 RUNNING'; echo; echo '9 PENDING'")
    assert slurm.jobs_of() == {"7_0": "RUNNING", "9": "PENDING"}
    fake("squeue", every + "echo '7_0 Priority'; echo; echo '9 launch failed requeued held'")
    assert slurm.waiting_reasons() == {"7_0": "Priority", "9": "launch failed requeued held"}
    fake("sinfo", every + "echo gpu; echo cpu; echo gpu")
    assert slurm.list_partitions() == ["gpu", "cpu"]
    fake("squeue", every + "[ $4 = --jobs=7_2 ] && echo COMPLETING")
    assert slurm.job_state("7_2") == "COMPLETING"
    fake("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert slurm.job_state("7_2") == ""
    for name in ("scontrol", "scancel"):
        fake(name, f"echo $0 $* >>{tmp_path}/ran")
    slurm.requeue("7_2")
    slurm.cancel(["8", "9_1"])
    assert (tmp_path / "ran").read_text().split() == [
        *(f"{tmp_path}/scontrol", "requeue", "7_2"),
        *(f"{tmp_path}/scancel", "8", "9_1"),
    ]


@pytest.mark.parametrize(
    ("call", "command"),
    [
        (slurm.jobs_of, "squeue"),
        (slurm.waiting_reasons, "squeue"),
        (lambda: slurm.job_state("7"), "squeue"),
        (slurm.list_partitions, "sinfo"),
        (lambda: slurm.requeue("7"), "scontrol"),
        (lambda: slurm.cancel(["7"]), "scancel"),
    ],
)
def test_errors(fake, tmp_path, monkeypatch, call, command):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"{command} does not run: No such file"):
        call()
    fake(command, "echo Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(UserError, match=f"{command} failed: Unable to contact slurm controller"):
        call()
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: run(*a, **{**k, "timeout": 0.1}))
    fake(command, "exec /bin/sleep 20")
    with pytest.raises(UserError, match=rf"{command} does not answer within \d+ s: is slurmctld"):
        call()


@pytest.mark.parametrize(
    ("script", "number", "requeued"),
    [
        ("echo RUNNING", signal.SIGUSR2, True),
        ("echo RUNNING", signal.SIGTERM, True),
        ("echo COMPLETING", signal.SIGUSR2, False),
        ("echo Invalid job id specified >&2; exit 1", signal.SIGUSR2, False),
        ("echo Unable to contact slurm controller >&2; exit 1", signal.SIGUSR2, True),
        ("echo Unable to contact slurm controller >&2; exit 1", signal.SIGTERM, False),
    ],
)
def test_a_stopped_job_is_requeued_unless_it_was_cancelled(
    fake, tmp_path, script, number, requeued
):
    class Environment:
        global_rank, num_tasks, job_id, cluster = 0, 1, "7", "slurm"

    fake("squeue", script)
    task = _Task(ToolJob("tools/tool.py", [], str(tmp_path), str(tmp_path)), Environment())
    task.signalled = number
    assert task._needs_requeue() == requeued


INHERITED = {
    "SLURM_JOB_ID": "999",
    "SLURM_JOBID": "999",
    "SLURM_NTASKS": "5",
    "SLURM_NPROCS": "5",
    "SLURM_PROCID": "3",
    "SLURM_CPUS_PER_TASK": "7",
    "SLURM_TRES_PER_TASK": "cpu=7",
    "SLURM_MEM_PER_NODE": "1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_RESTART_COUNT": "4",
    "SLURMD_NODENAME": "n1",
    "SRUN_DEBUG": "3",
    "SBATCH_CPU_BIND": "none",
    "SUBMITIT_EXECUTOR": "slurm",
    "PMI_RANK": "3",
    "RANK": "3",
    "MASTER_ADDR": "n1",
}
SETTINGS = {
    "SLURM_CONF": "/etc/slurm.conf",
    "SLURM_TIME_FORMAT": "relative",
    "SBATCH_ACCOUNT": "vision",
    "RANKING": "1",
}


@pytest.mark.parametrize("inside", [True, False])
def test_sbatch_inherits_nothing_of_the_allocation_it_is_called_in(
    fake, tmp_path, monkeypatch, inside
):
    fake("srun", "")
    fake("sbatch", f"env -0 >{tmp_path}/environment; echo Submitted batch job 7")
    # A MASTER_ADDR that an earlier run left in the shell would misdirect the ranks.
    outside = {"SLURM_PARTITION": "gpu", "MASTER_ADDR": "stale"}
    given = (INHERITED if inside else outside) | SETTINGS
    for name in INHERITED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    job = ToolJob("tools/tool.py", [], str(tmp_path), str(tmp_path))
    assert [j.job_id for j in submit([job], Cluster(), str(tmp_path / "jobs"), "run")] == ["7"]
    received = (tmp_path / "environment").read_text().split("\0")
    received = dict(line.split("=", 1) for line in received if line)
    assert {k: v for k, v in received.items() if k in INHERITED | given} == (
        SETTINGS if inside else {"SLURM_PARTITION": "gpu"} | SETTINGS
    )
    assert dict(os.environ) == before


def test_a_local_job_is_not_part_of_the_allocation_it_is_started_in(monkeypatch, tmp_path):
    for name, value in (INHERITED | SETTINGS).items():
        monkeypatch.setenv(name, value)
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import os, sys, json\nopen(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))\n"
    )
    out = tmp_path / "environment.json"
    job = ToolJob("tool.py", [str(out)], str(tmp_path / "run"), str(tmp_path), resume="")
    (submitted,) = submit([job], Cluster(kind="local"), str(tmp_path / "jobs"), "run")
    assert submitted.result() == str(tmp_path / "run")
    received = json.loads(out.read_text())
    # submitit's local executor sets its own
    own = {k: v for k, v in received.items() if k in INHERITED}
    assert own == {"SUBMITIT_EXECUTOR": "local"}
    assert SETTINGS.items() <= received.items()
    assert os.environ["SLURM_JOB_ID"] == "999"
    (attempt,) = read_attempts(str(tmp_path / "run"))
    assert (attempt["restart"], attempt["outcome"]) == (0, "finished")


def commands_in(path: Path) -> set[str]:
    """SLURM's commands in a module: as a string of their own, or in a call of subprocess or os."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= COMMANDS & {node.value}
        elif isinstance(node, ast.Call) and re.match(r"(subprocess|os)\.", ast.unparse(node.func)):
            found |= COMMANDS & set(re.findall(r"\w+", ast.unparse(node)))
    return found


@pytest.mark.parametrize("folder", ["region_pretrain", "projects", "tools"])
def test_no_other_module_runs_a_command_of_slurm(folder):
    found = {str(p.relative_to(ROOT)): commands_in(p) for p in (ROOT / folder).rglob("*.py")}
    others = {name: words for name, words in found.items() if words and name not in ALLOWED}
    assert not others, f"use region_pretrain.jobs.slurm: {others}"


def test_the_search_finds_commands(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("subprocess.run('squeue --me', shell=True)\nx = ['scancel', job]\n'an srun'\n")
    assert commands_in(path) == {"squeue", "scancel"}
    assert commands_in(ROOT / "region_pretrain/jobs/slurm.py") >= {"squeue", "scontrol", "sinfo"}


def test_slurm_is_asked_again_while_it_does_not_answer(fake, tmp_path):
    fake(
        "squeue", f"echo x >>{tmp_path}/n; [ $(wc -l <{tmp_path}/n) -lt 3 ] && exit 1; echo RUNNING"
    )
    said = []
    ask = lambda: slurm.job_state("7")  # noqa: E731
    assert slurm.patiently(ask, said.append, seconds=0.01) == "RUNNING"
    assert said == ["squeue failed: ; asking again every 0.01 s"]
    fake("squeue", "echo no controller >&2; exit 1")
    with pytest.raises(slurm.Unavailable, match="no controller"):
        slurm.patiently(ask, said.append, seconds=0.01, times=2)
