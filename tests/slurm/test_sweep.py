"""A sweep on a real SLURM: two methods with two seeds, and a third method that fails."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_runs import ROOT, wait_until

from region_pretrain.jobs.attempts import read_attempts
from region_pretrain.sweeps import state
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def swept(slurm, tmp_path_factory):
    """The folder of a sweep whose jobs have all ended, and functions to call and restart it."""
    folder = tmp_path_factory.mktemp("sweep")
    environment = {**slurm, "DETECTRON2_DATASETS": str(folder / "datasets")}

    def tool(*words):
        command = [sys.executable, str(ROOT / "tools/sweep.py"), *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start():
        resources = "partition=low,tasks-per-node=1,cpus-per-task=1,mem=1G"
        settings = ["--slurm", f"{resources},finetune.tasks-per-node=2"]
        config = ["--config", str(Path(__file__).with_name("tiny_sweep.py"))]
        tool(*config, *settings, f"sweep.output_dir={folder / 'out'}")
        empty = ["squeue", "--noheader"]
        wait_until(lambda: not subprocess.check_output(empty, env=environment), folder, 600)

    start()
    return folder / "out", tool, start


def runs_of(folder, kind):
    plan = state.read_sweep(str(folder)).plan
    return {
        (entry["init"], entry["seed"]): plan.runs[entry["run"]]
        for entry in plan.entries
        if entry["kind"] == kind
    }


def test_dependents_run_afterwards_and_a_failure_stays_local(swept):
    folder, tool, _ = swept
    pretrained, tuned = runs_of(folder, PRETRAIN), runs_of(folder, FINETUNE)
    assert len(pretrained) == len(tuned) == 6
    for key, run in tuned.items():
        parent = read_attempts(pretrained[key].folder)
        if key[0] == "broken":
            assert parent[-1]["outcome"] == "failed" and not read_attempts(run.folder)
        else:
            (before,), (after,) = parent, read_attempts(run.folder)
            assert before["outcome"] == after["outcome"] == "finished"
            assert after["started"] > before["ended"]
            config = (Path(run.folder) / "config.yaml").read_text()
            assert f"{pretrained[key].folder}/model_final.pth" in config
    output = tool("status", str(folder))
    assert "8 finished" in output and "2 failed" in output and "2 blocked" in output
    assert "broken_seed0 failed; these runs depend on it: broken_seed0_det" in output
    assert "ValueError: the weather is bad" in output


def test_fine_tunings_have_resources_of_their_own(swept):
    folder, *_ = swept
    for kind, processes in ((PRETRAIN, 1), (FINETUNE, 2)):
        for (init, _), run in runs_of(folder, kind).items():
            if init != "broken":
                log = (Path(run.folder) / "log.txt").read_text()
                assert f"rank 0 of {processes} processes" in log, run.name


def test_the_table_matches_the_results_of_the_runs(swept):
    folder, tool, _ = swept
    tool("report", str(folder))
    with open(folder / "results.csv", encoding="utf-8") as file:
        rows = {(r["initialisation"], int(r["pretrain_seed"])): r for r in csv.DictReader(file)}
    assert rows.keys() == {(init, seed) for init in ("byol", "moco") for seed in (0, 1)}
    pretrained = runs_of(folder, PRETRAIN)
    for start in ("byol", "moco"):
        for seed in (0, 1):
            lines = (Path(pretrained[start, seed].folder) / "metrics.json").read_text().splitlines()
            peak = max(json.loads(line)["peak_memory_mib"] for line in lines)
            assert float(rows[start, seed]["memory_mib"]) == pytest.approx(peak)
        for seed in (0, 1):
            assert "bbox" in json.loads(
                Path(runs_of(folder, FINETUNE)[start, seed].product).read_text()
            )
    assert "Failed: broken_seed0, broken_seed1." in (folder / "report.md").read_text()


def test_a_restart_submits_only_what_failed(swept):
    folder, _, start = swept
    start()
    times = {
        (kind, *key): state.read_record(run).submitted
        for kind in (PRETRAIN, FINETUNE)
        for key, run in runs_of(folder, kind).items()
        if key[0] != "broken"
    }
    assert set(times.values()) == {1} and len(times) == 8
    broken = runs_of(folder, PRETRAIN)["broken", 0]
    assert state.read_record(broken).submitted == 2 and not state.is_finished(broken)
