"""The Shapes benchmark: its sizes, and the quick one end to end, cut down to a minute."""

import csv
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from region_pretrain.config import changed_keys, load_config
from region_pretrain.sweeps import configs, state
from region_pretrain.sweeps.definition import load_sweep
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, TRIAL
from region_pretrain.sweeps.plan import make_plan

ROOT = Path(__file__).parents[2]
REPORT = ("report.html", "report.md", "results.csv")
TINY = {
    "pretrain_overrides": [
        "train.device=cpu",
        "dataloader.train.num_workers=0",
        "dataloader.train.dataset.names.size=24",
        "dataloader.train.total_batch_size=8",
        "train.log_period=1",
    ],
    "finetune_overrides": [
        "train.device=cpu",
        "dataloader.train.num_workers=0",
        "dataloader.train.dataset.names.size=16",
        "dataloader.train.total_batch_size=4",
        "dataloader.test.dataset.names.size=8",
        "train.max_iter=4",
        "train.log_period=1",
    ],
}
METHODS = {"supervised", "moco", "byol", "soco", "ccop", "mcl", "point"}


def overrides(run):
    return [a for a in run.tasks[0] if "=" in a and not a.startswith("@")]


def config(run):
    arguments = run.tasks[0]
    return configs.load(arguments[arguments.index("--config-file") + 1], overrides(run))


#: The detector of the ceiling is trained before shapes_long.py, and does not exist here.
NO_CEILING = "sweep.baselines.full=null"
ONE_RATE = "sweep.finetune.detector.learning_rates=[0.1]"


@functools.cache
def planned(name, *changes):
    """A sweep with one seed, and its plan."""
    sweep = load_sweep(str(ROOT / f"configs/sweeps/{name}.py"), ["sweep.seeds=[1]", *changes])
    return sweep, make_plan(sweep)


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
    assert len(trials) == len(results) * len(sweep.finetune["detector"].learning_rates)
    for cfg in results + trials:
        cfg.optimizer.lr = cfg.train.seed = cfg.train.init_checkpoint = cfg.train.output_dir = 0
    first, trial = results[0], trials[0]
    assert all(cfg == first for cfg in results) and all(cfg == trial for cfg in trials)
    assert first.dataloader.train == trial.dataloader.train
    tests = first.dataloader.test.dataset.names, trial.dataloader.test.dataset.names
    assert tests[0].split == tests[1].split == "val" and tests[0].size == tests[1].size
    assert tests[0].seed != tests[1].seed
    assert first.lr_multiplier.steps[-1] < first.lr_multiplier.max_iter == first.train.max_iter


def test_the_full_size_is_adapted_as_the_small_detectors_configs():
    def pretrained(size):
        sweep = load_sweep(str(ROOT / f"configs/sweeps/shapes_{size}.py"), [])
        return {k: load_config(e.config, e.overrides).model for k, e in sweep.pretrain.items()}

    small, full = pretrained("quick"), pretrained("full")
    heads = ("head", "image_head", "region_head")
    keys = (
        "temperature",
        "zero_init",
        "momentum",
        *(f"{h}.{k}" for h in heads for k in ("norm", "init_std")),
    )
    for init in ("moco", "byol", "ccop", "point"):
        for key in keys:
            ours, theirs = (OmegaConf.select(models[init], key) for models in (full, small))
            assert ours == theirs, (init, key)


def test_the_ablation_shares_its_full_method_with_the_benchmark(tmp_path):
    def runs(name):
        changes = [f"sweep.output_dir={tmp_path / name}"]
        plan = make_plan(load_sweep(str(ROOT / f"configs/sweeps/{name}.py"), changes))
        pairs = ((e, plan.runs[e["run"]]) for e in plan.entries if e["kind"] == PRETRAIN)
        return {(e["init"], e["seed"]): run for e, run in pairs}

    whole, parts = runs("shapes_quick"), runs("point_region_ablation")
    assert {init for init, _ in parts} == {"all", "in_image", "pooled", "distillation"}
    for seed in (0, 1):
        assert parts["all", seed].id == whole["point", seed].id
        assert len({parts[init, seed].id for init, _ in parts}) == 4


def test_labels_and_lengths_share_the_runs_of_the_long_benchmark():
    def load(name):
        # One learning rate: the runs that choose it are parents of the fine-tunings.
        sweep, plan = planned(name, *([ONE_RATE, NO_CEILING] if name == "shapes_long" else []))
        wanted = [e for e in plan.entries if e["kind"] == FINETUNE and e["seed"] == 1]
        return sweep, {(e["init"], e["label_fraction"]): plan.runs[e["run"]] for e in wanted}

    long, whole = load("shapes_long")
    labels, by_count = load("shapes_labels")
    lengths, by_length = load("shapes_lengths")
    _, steps = planned("shapes_steps")
    assert long.output_dir == labels.output_dir == lengths.output_dir
    assert long.name == labels.name == lengths.name

    pretrained = {e["run"] for e in steps.entries if e["kind"] == PRETRAIN}
    inits, counts = ("random", "byol_twice", "ccop", "mcl_twice"), (25, 50, 100, 200, 400, 1000)
    assert set(by_count) == set(itertools.product(inits, (n / 1000 for n in counts)))
    for (init, fraction), run in by_count.items():
        cfg = config(run)
        data = cfg.dataloader.train.dataset
        assert data.names.size == 1000 and data.get("fraction", 1) == fraction
        assert data.get("seed", 1) == cfg.train.seed == 1
        assert cfg.train.max_iter == cfg.lr_multiplier.max_iter == 900 and cfg.optimizer.lr == 0.1
        assert set(run.parents) <= pretrained and len(run.parents) == (init != "random")

    methods = METHODS - {"supervised"}
    assert {init for init, _ in by_length} == {"random"} | {
        f"{method}{suffix}" for method in methods for suffix in ("", "_quarter", "_sixteenth")
    }
    assert {by_length[init, 1.0].id for init in ("random", *methods)} == {
        whole[init, 1.0].id for init in ("random", *methods)
    }
    seen = {entry.images_seen for entry in lengths.pretrain.values()}
    assert seen == {None, 109 * 32, 434 * 32}
    assert lengths.images_seen == long.images_seen == 1736 * 32


@pytest.mark.parametrize(("data", "steps"), [("shapes", {300, 900}), ("emoji", {900})])
def test_longer_fine_tunings_share_the_pre_trainings_of_the_long_benchmark(data, steps):
    sweep, plan = planned(f"{data}_steps", *[NO_CEILING] * (data == "emoji"))
    long, whole = planned(f"{data}_long", ONE_RATE, NO_CEILING)
    assert (sweep.output_dir, sweep.name) == (long.output_dir, long.name)
    pretrained = {e["init"]: e["run"] for e in whole.entries if e["kind"] == PRETRAIN}
    detector = next(e for e in whole.entries if e["kind"] == FINETUNE and e["init"] == "random")
    reference, found = config(whole.runs[detector["run"]]), {}
    for entry in plan.entries:
        if entry["kind"] == PRETRAIN:
            assert entry["run"] == pretrained.get(entry["init"], entry["run"])
            found.setdefault(entry["init"], set())
        elif entry["kind"] == FINETUNE:
            cfg = config(plan.runs[entry["run"]])
            changed = {key.partition(".")[0] for key in changed_keys(reference, cfg)}
            assert changed <= {"train", "optimizer", "lr_multiplier"} and cfg.optimizer.lr == 0.1
            found.setdefault(entry["init"], set()).add(cfg.train.max_iter)
    left_out = {"supervised"} if data == "shapes" else set()
    assert found == dict.fromkeys(METHODS - left_out | {"byol_twice", "mcl_twice", "random"}, steps)


def test_other_lengths_are_compared_with_runs_of_the_long_benchmark():
    (steps, usual), (sweep, plan) = planned("shapes_steps"), planned("shapes_four_times")
    assert (sweep.output_dir, sweep.name) == (steps.output_dir, steps.name)
    pretrained = {e["init"]: e["run"] for e in plan.entries if e["kind"] == PRETRAIN}
    lengths, methods = {"": 1736, "_quarter": 434, "_four_times": 6944}, METHODS - {"supervised"}
    assert set(pretrained) == {f"{name}{suffix}" for name in methods for suffix in lengths}
    for name in methods:
        runs = {suffix: config(plan.runs[pretrained[f"{name}{suffix}"]]) for suffix in lengths}
        assert {suffix: cfg.train.max_iter for suffix, cfg in runs.items()} == lengths
        for suffix, cfg in runs.items():
            assert sweep.methods[f"{name}{suffix}"] == sweep.methods[name]
            changed = {key.partition(".")[0] for key in changed_keys(runs[""], cfg)}
            assert changed <= {"train", "lr_multiplier"}
    for entry in plan.entries:
        if entry["kind"] == FINETUNE:
            assert config(plan.runs[entry["run"]]).train.max_iter == 900
            assert "_" in entry["init"] or entry["run"] in usual.runs


def test_overrides_of_single_list_entries():
    # So do docs/gpu.md and the comment in shapes_long.py.
    changes = [
        "sweep.pretrain_overrides.0='train.device=cuda'",
        "sweep.pretrain_overrides.2='train.amp.enabled=false'",
        "sweep.seeds=[0]",
    ]
    sweep = load_sweep(str(ROOT / "configs/sweeps/shapes_long.py"), [*changes, NO_CEILING])
    found = {
        (run.kind, config(run).train.device, config(run).train.amp.enabled)
        for run in make_plan(sweep).runs.values()
        if run.kind in (PRETRAIN, FINETUNE)
    }
    assert found == {(PRETRAIN, "cuda", False), (FINETUNE, "cpu", False)}


def test_regions_and_probes_share_the_runs_of_the_long_benchmark():
    def runs(name):
        _, plan = planned(name)
        found = {
            (e["kind"], e.get("finetune"), e["init"]): plan.runs[e["run"]] for e in plan.entries
        }
        return plan, found

    _, lengths = runs("shapes_lengths")
    plan, regions = runs("shapes_regions")
    parents = {
        init: [plan.runs[p] for p in run.parents]
        for (kind, _, init), run in regions.items()
        if kind == PRETRAIN
    }
    methods = ("soco", "ccop", "point")
    for init in methods:
        assert regions[PRETRAIN, None, init].id == lengths[PRETRAIN, None, init].id
    assert parents["point"] == [] and parents["point_boxes"] == parents["soco"]
    stores = [parents[f"{init}_annotated"] for init in methods]
    assert len(stores[0]) == 1 and stores == [stores[0]] * 3
    for init in methods:
        data = config(regions[PRETRAIN, None, f"{init}_annotated"]).dataloader.train.dataset
        assert data.recipe == "ground_truth-v1" and data.allow_ground_truth
        assert data.regions == stores[0][0].product

    _, probes = runs("shapes_probes")
    for (kind, finetune, init), run in probes.items():
        if finetune != "frozen_trunk":
            assert run.id == lengths[kind, finetune, init].id
            continue
        cfg, other = config(run), config(probes[kind, "detector", init])
        assert cfg.train.max_iter == 100 and cfg.train.freeze == ["backbone.bottom_up"]
        assert cfg.train.init_checkpoint == other.train.init_checkpoint
    assert sum(finetune == "frozen_trunk" for _, finetune, _ in probes) == 19


def test_continued_and_random_pre_trainings_differ_only_in_weights_and_recipe(tmp_path):
    changes = [f"sweep.output_dir={tmp_path}"]
    plan = make_plan(load_sweep(str(ROOT / "configs/sweeps/shapes_continued.py"), changes))
    runs = {
        (e["init"], e["seed"]): plan.runs[e["run"]] for e in plan.entries if e["kind"] == PRETRAIN
    }
    assert {init for init, _ in runs} == {"start"} | {
        f"{method}_{weights}"
        for method in METHODS - {"supervised"}
        for weights in ("continued", "unchanged", "random")
    }
    # Of the second seed, only the seed and the paths that contain a run's id differ.
    paths = ("train.seed=", "train.init_checkpoint=", "train.output_dir=")

    def of_both_seeds(run):
        return [word for word in run.tasks[0] if not word.startswith(paths)]

    recipe = {
        "train.init_checkpoint",
        "lr_multiplier.warmup_epochs",
        "optimizer.lr",
        "model.momentum.start",
    }
    for (init, seed), run in runs.items():
        if seed == 1:
            assert of_both_seeds(run) == of_both_seeds(runs[init, 0])
        cfg = config(run)
        assert cfg.train.epochs == (10 if init == "start" else 3) and cfg.train.max_iter is None
        assert cfg.dataloader.train.total_batch_size == 32 and cfg.train.seed == seed
        method, _, weights = init.partition("_")
        if weights not in ("continued", "unchanged"):
            assert cfg.train.init_checkpoint == ""
            continue
        assert runs["start", seed].id in run.parents
        assert cfg.train.init_checkpoint == runs["start", seed].product
        if seed == 1:
            continue
        other = config(runs[f"{method}_random", seed])
        changed = set(changed_keys(other, cfg)) - {"train.output_dir"}
        if weights == "unchanged":
            assert changed == {"train.init_checkpoint"}
            continue
        factor = 5 if "LARS" in str(cfg.optimizer._target_) else 3
        assert cfg.optimizer.lr == pytest.approx(other.optimizer.lr / factor, rel=0.02)
        assert changed <= recipe
    rates = {config(plan.runs[e["run"]]).optimizer.lr for e in plan.entries if "finetune" in e}
    assert rates == {0.1} and len(plan.runs) == 2 + 2 * (19 + 20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two methods, one seed and a few steps of the quick benchmark; MoCo v2 continues SoCo."""
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = [
        "sweep.seeds=[0]",
        "sweep.images_seen=32",
        f"sweep.output_dir={folder / 'out'}",
        *(f"sweep.pretrain.{m}=null" for m in METHODS - {"moco", "soco"}),
        "sweep.baselines.random=null",
        "+sweep.pretrain.moco.init_from=soco",
        *(f"sweep.{key}={json.dumps(values)}" for key, values in TINY.items()),
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
    folder, output, _ = finished
    plan = state.read_sweep(str(folder)).plan
    assert f"\n\n{len(plan.runs)} finished\n" in output and len(plan.runs) == 11
    for run in plan.runs.values():
        assert re.search(rf"^\[\d+/11\] {run.name}: finished, \d+\.\d min$", output, re.M)
    results, paths = output.split("\n\n")[-2:]
    for init in ("MoCo v2", "SoCo"):
        assert re.search(rf"^{init} .*\d\.\d", results, re.M)
    assert paths.split() == [str(folder / name) for name in REPORT]
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
            assert "backbone.bottom_up" in log  # the table of loaded weights
    for entry in plan.entries:
        if entry["kind"] == PRETRAIN:
            lines = (Path(plan.runs[entry["run"]].folder) / "metrics.json").read_text().splitlines()
            assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2, 3]


def test_a_chain_starts_from_the_weights_of_the_other_run(finished):
    plan = state.read_sweep(str(finished[0])).plan
    runs = {run.name: run for run in plan.runs.values()}
    log = (Path(runs["moco_seed0"].folder) / "log.txt").read_text()
    table = log[log.index(f"weights from {runs['soco_seed0'].product} (") :]
    assert re.search(r"^backbone.bottom_up +120/120 .* loaded$", table, re.M)
    ended = Path(runs["soco_seed0"].product).stat().st_mtime
    assert ended < (Path(runs["moco_seed0"].folder) / "config.yaml").stat().st_mtime


def test_report_and_status_commands(finished):
    folder, _, tool = finished
    done = tool("report", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / name) for name in REPORT]
    table = [line for line in (folder / "report.md").read_text().splitlines() if "| 1 |" in line]
    assert [line.split(" | ")[0] for line in table] == ["| MoCo v2", "| SoCo"]
    metrics = next((folder / "runs").glob("moco_seed0-*")) / "metrics.json"
    peak = max(json.loads(line)["peak_memory_mib"] for line in metrics.read_text().splitlines())
    assert f"| {peak:.0f} |" in table[0] and 100 < peak < 10_000
    with open(folder / "results.csv", encoding="utf-8") as file:
        lines = {line["initialisation"]: line for line in csv.DictReader(file)}
    # MoCo v2 continues SoCo, each with 32 images; there are 16 labelled scenes.
    found = {init: (line["images_seen"], line["labels"]) for init, line in lines.items()}
    assert found == {"moco": ("64", "16"), "soco": ("32", "16")}
    done = tool("status", str(folder))
    assert done.returncode == 0 and "4/4" in done.stdout and "11 finished" in done.stdout


def test_bad_input_ends_with_one_line(finished):
    done = finished[2]("--config", "absent.py")
    assert (done.returncode, done.stderr) == (2, "error: no config file absent.py\n")
