"""The Shapes benchmark: its sizes, and the quick one from end to end at a minute's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from region_pretrain.config import load_config
from region_pretrain.sweeps import state
from region_pretrain.sweeps.definition import load_sweep
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, TRIAL
from region_pretrain.sweeps.plan import make_plan

ROOT = Path(__file__).parents[2]
_QUICK_PRETRAIN = (
    "dataloader.train.dataset.names.size=24",
    "dataloader.train.total_batch_size=8",
    "dataloader.train.num_workers=0",
    "train.max_iter=4",
    "train.log_period=1",
)
_QUICK_DETECTION = (
    "dataloader.train.dataset.names.size=16",
    "dataloader.train.total_batch_size=4",
    "dataloader.train.num_workers=0",
    "dataloader.test.dataset.names.size=8",
    "train.max_iter=4",
    "train.eval_period=2",
    "train.log_period=1",
)
REPORT = ("report.html", "report.md", "results.csv")
METHODS = {"supervised", "moco", "byol", "soco", "ccop", "mcl", "point"}


def overrides(run):
    return [a for a in run.tasks[0] if "=" in a and not a.startswith("@")]


def config(run):
    arguments = run.tasks[0]
    return load_config(arguments[arguments.index("--config-file") + 1], overrides(run))


@pytest.mark.parametrize(("size", "side"), [("quick", 96), ("medium", 96), ("full", 256)])
def test_every_method_has_the_same_budget_data_and_protocol(size, side, tmp_path):
    changes = ["sweep.seeds=[0]", f"sweep.output_dir={tmp_path}"]
    sweep = load_sweep(str(ROOT / f"configs/sweeps/shapes_{size}.py"), changes)
    left_out = {"supervised"} if size == "medium" else set()
    assert METHODS - left_out == set(sweep.pretrain) and list(sweep.baselines) == ["random"]
    plan = make_plan(sweep)
    kinds = {e["run"]: e["kind"] for e in plan.entries}
    of = {kind: [r for r in plan.runs.values() if kinds[r.id] == kind] for kind in kinds.values()}
    assert len(of[PRETRAIN]) == len(sweep.pretrain)
    seen, names = set(), set()
    for run in of[PRETRAIN]:
        cfg = config(run)
        seen.add(cfg.train.max_iter * cfg.dataloader.train.total_batch_size)
        data = cfg.dataloader.train.dataset.names
        data = data.names if "names" in data else data
        names.add(json.dumps({k: v for k, v in data.items() if k != "_target_"}, sort_keys=True))
        assert data.split == "unlabeled" and data.side == side
    assert seen == {sweep.images_seen} and len(names) == 1
    results, trials = [config(r) for r in of[FINETUNE]], [config(r) for r in of[TRIAL]]
    assert len(trials) == len(results) * len(sweep.finetune["detector"].rates)
    for cfg in results + trials:
        cfg.optimizer.lr = cfg.train.seed = cfg.train.init_checkpoint = cfg.train.output_dir = 0
    first, trial = results[0], trials[0]
    assert all(cfg == first for cfg in results) and all(cfg == trial for cfg in trials)
    assert first.dataloader.train == trial.dataloader.train
    tests = first.dataloader.test.dataset.names, trial.dataloader.test.dataset.names
    assert tests[0].split == tests[1].split == "val" and tests[0].size == tests[1].size
    assert tests[0].seed != tests[1].seed
    assert first.lr_multiplier.steps[-1] < first.lr_multiplier.max_iter == first.train.max_iter


def test_the_ablation_is_the_benchmark_with_one_part_less(tmp_path):
    def runs(name):
        changes = [f"sweep.output_dir={tmp_path / name}"]
        plan = make_plan(load_sweep(str(ROOT / f"configs/sweeps/{name}.py"), changes))
        pairs = ((e, plan.runs[e["run"]]) for e in plan.entries if e["kind"] == PRETRAIN)
        return {(e["init"], e["seed"]): run for e, run in pairs}

    whole, parts = runs("shapes_quick"), runs("point_region_ablation")
    assert {start for start, _ in parts} == {"all", "in_image", "pooled", "distillation"}
    for seed in (0, 1):
        assert parts["all", seed].id == whole["point", seed].id
        assert len({parts[start, seed].id for start, _ in parts}) == 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two methods, one seed, a few steps; all that the benchmark does otherwise."""
    folder = tmp_path_factory.mktemp("benchmark")
    pretrain = [o for o in _QUICK_PRETRAIN if not o.startswith("train.max_iter")]
    detection = [o for o in _QUICK_DETECTION if not o.startswith("train.eval_period")]
    changes = {
        "pretrain_overrides": ["train.device=cpu", *pretrain],
        "finetune_overrides": ["train.device=cpu", *detection],
    }
    arguments = [
        "sweep.seeds=[0]",
        "sweep.images_seen=32",
        f"sweep.output_dir={folder / 'out'}",
        *(f"sweep.pretrain.{m}=null" for m in METHODS - {"moco", "soco"}),
        "sweep.baselines.random=null",
        *(f"sweep.{key}={json.dumps(values)}" for key, values in changes.items()),
    ]
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def tool(*words):
        command = [sys.executable, "tools/sweep.py", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    command = ["--config", "configs/sweeps/shapes_quick.py", "--jobs", "2", "--wait", *arguments]
    done = tool(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout, tool


def test_every_run_finished_and_the_choice_was_taken(finished):
    folder, said, _ = finished
    plan = state.read_sweep(str(folder)).plan
    assert f"\n\n{len(plan.runs)} finished\n" in said and len(plan.runs) == 11
    assert said.split()[-3:] == [str(folder / name) for name in REPORT]
    chosen = {}
    for entry in plan.entries:
        run = plan.runs[entry["run"]]
        assert Path(run.product).is_file()
        if entry["kind"] == "choice":
            chosen[entry["init"]] = float(Path(run.product).read_text().split("=")[1])
    assert chosen.keys() == {"moco", "soco"}
    for entry in plan.entries:
        if entry["kind"] == FINETUNE:
            saved = load_config(str(Path(plan.runs[entry["run"]].folder) / "config.yaml"))
            assert saved.optimizer.lr == chosen[entry["init"]] in (0.05, 0.1)
            log = (Path(plan.runs[entry["run"]].folder) / "log.txt").read_text()
            assert "backbone.bottom_up" in log  # the table of what was loaded
    for entry in plan.entries:
        if entry["kind"] == PRETRAIN:
            lines = (Path(plan.runs[entry["run"]].folder) / "metrics.json").read_text().splitlines()
            assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2, 3]


def test_report_and_status_of_it(finished):
    folder, _, tool = finished
    done = tool("report", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / name) for name in REPORT]
    table = [line for line in (folder / "report.md").read_text().splitlines() if "| 1 |" in line]
    assert [line.split(" | ")[0] for line in table] == ["| MoCo v2", "| SoCo"]
    metrics = next((folder / "runs").glob("moco_seed0-*")) / "metrics.json"
    peak = max(json.loads(line)["peak_memory_mib"] for line in metrics.read_text().splitlines())
    assert f"| {peak:.0f} |" in table[0] and 100 < peak < 10_000
    done = tool("status", str(folder))
    assert done.returncode == 0 and "4/4" in done.stdout and "11 finished" in done.stdout


def test_bad_input_ends_with_one_line(finished):
    done = finished[2]("--config", "absent.py")
    assert (done.returncode, done.stderr) == (2, "error: no config file absent.py\n")
