"""SLURM's commands: their answers, their errors, and that only one module runs them."""

import ast
import re
import signal
import subprocess
from pathlib import Path

import pytest

from region_pretrain.errors import UserError
from region_pretrain.jobs import slurm
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
    fake("squeue", "echo '7_0 RUNNING'; echo; echo '9 PENDING'")
    assert slurm.my_jobs() == {"7_0": "RUNNING", "9": "PENDING"}
    fake("sinfo", "echo gpu; echo cpu; echo gpu")
    assert slurm.list_partitions() == ["gpu", "cpu"]
    fake("squeue", "[ $3 = --jobs=7_2 ] && echo COMPLETING")
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
        (slurm.my_jobs, "squeue"),
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
