"""Which probe predicts the AP: a plan of real command lines whose results are given."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from sweep_plans import BYOL, DETECTOR, MOCO, sweep

from region_pretrain.config import load_config
from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import probes, state
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN
from region_pretrain.sweeps.plan import make_plan
from region_pretrain.sweeps.state import SweepFile

ROOT = Path(__file__).parents[2]
SMALL = "{_target_:region_pretrain.data.shapes.shapes,split:SPLIT,size:6,side:64,level:clear}"
AP = {"moco": (10.0, 30.0), "byol": (20.0, 40.0)}  # by pre-training seed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """2 methods x 2 seeds, each with 2 fine-tunings, and a short fine-tuning as a probe."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    data = [
        f"dataloader.{key}.dataset.names={SMALL.replace('SPLIT', split)}"
        for key, split in (("train", "train"), ("test", "val"))
    ]
    det = {"config": DETECTOR, "overrides": [*data, "train.device=cpu"], "seeds": [0, 1]}
    definition = sweep(
        tmp_path / "out",
        pretrain={"moco": {"config": MOCO}, "byol": {"config": BYOL}},
        baselines={"random": {}},
        finetune={"det": det, "short": {**det, "overrides": [*data, "train.max_iter=10"]}},
        seeds=[0, 1],
    )
    plan = make_plan(definition)
    for entry in plan.entries:
        run = plan.runs[entry["run"]]
        Path(run.folder).mkdir(parents=True)
        if entry["kind"] == FINETUNE and "pretrain_seed" in entry:
            ap = AP[entry["init"]][entry["pretrain_seed"]]
            # The short one is the best where the other is the worst.
            ap = ap + entry["seed"] if entry["finetune"] == "det" else 50 - ap
            Path(run.product).write_text(json.dumps({"bbox": {"AP": ap}}))
            lines = [{"iteration": i, "time": 3.0} for i in (4, 9)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            Path(run.folder, "metrics.json").write_text(text)
    cluster = Cluster(kind="local", jobs=1)
    file = SweepFile("s", "s", "", cluster, str(ROOT), str(ROOT), {}, None, plan)
    state.write_sweep(str(tmp_path / "out"), file)
    return tmp_path / "out"


def given(cfg):
    """A probe whose values follow from the weights that are probed."""
    name = cfg.train.init_checkpoint.split("/")[-2]
    init, seed = name.split("-")[0].split("_seed")
    ap = AP[init][int(seed)]
    accuracy = {"knn": {"top1": ap / 50}, "linear": {"top1": 0.5}}
    result = {
        "levels": {"fpn": {**accuracy, "retrieval": 1 / ap, "variance_within": None}},
        "seconds": {"features": 2.0, "second_view": 3.0, "knn": 0.25, "linear": 0.5},
    }
    target = Path(cfg.train.output_dir, "probe.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result))
    return result


def test_table_and_file(folder, monkeypatch):
    monkeypatch.setattr(probes, "do_probe", given)
    found = probes.probe_checkpoints(str(folder))
    assert [(c.labels, c.ap) for c in found] == [
        ((init, seed, "final", 1.0), AP[init][seed] + 0.5) for init in AP for seed in (0, 1)
    ]
    assert found[0].probes == {
        "knn_fpn": 0.2, "linear_fpn": 0.5, "retrieval_fpn": 0.1, "short": 40.0
    }  # fmt: skip
    # Each of the two logged lines is the mean of 5 steps of 3 s.
    assert found[0].seconds == {
        "knn_fpn": 2.25, "linear_fpn": 2.5, "retrieval_fpn": 5.0, "short": 30.0
    }  # fmt: skip
    rows = [line.split("|")[1:-1] for line in probes.rank_correlations(found).splitlines()[2:]]
    table = {name.strip(): [float(v) for v in values] for name, *values in rows}
    assert list(table)[0] == "knn_fpn"
    assert table == {
        "knn_fpn": [1.0, 4, 2.2],
        "linear_fpn": [0.0, 4, 2.5],
        "retrieval_fpn": [-1.0, 4, 5.0],
        "short": [-1.0, 4, 30.0],
    }
    # With fewer labels, AP and probes both fall: each label fraction is compared by itself.
    fewer = [dataclasses.replace(c, labels=(*c.labels[:3], 0.1), ap=c.ap / 9) for c in found]
    whole, fraction = probes.rank_correlations(found + fewer).split("\n\n10 % of the labels:\n\n")
    assert whole == f"100 % of the labels:\n\n{probes.rank_correlations(found)}"
    assert fraction == probes.rank_correlations(fewer) == probes.rank_correlations(found)
    lines = list(csv.DictReader(probes.probes_csv(found).splitlines()))
    assert lines[3]["initialisation"] == "byol" and lines[3]["pretrain_seed"] == "1"
    assert float(lines[3]["knn_fpn"]) == 0.8 and float(lines[3]["short_seconds"]) == 30.0

    def twice(cfg):
        raise AssertionError("probed again")

    monkeypatch.setattr(probes, "do_probe", twice)
    assert probes.probe_checkpoints(str(folder)) == found


def test_a_probe_is_repeated_once_its_fine_tuning_has_been(folder, monkeypatch):
    probed = []
    monkeypatch.setattr(probes, "do_probe", lambda cfg: probed.append(cfg) or given(cfg))
    probes.probe_checkpoints(str(folder))
    product = probed[1].train.output_dir.replace("probes", "runs") + "/results.json"
    later = os.path.getmtime(product) + 5
    os.utime(product, (later, later))
    probes.probe_checkpoints(str(folder))
    assert len(probed) == 5 and probed[4] == probed[1]


def test_relative_paths_refer_to_the_folder_of_the_start(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(probes, "do_probe", lambda cfg: seen.append(os.getcwd()) or given(cfg))
    monkeypatch.chdir(tmp_path)
    probes.probe_checkpoints("out")
    assert seen == [str(ROOT)] * 4 and os.getcwd() == str(tmp_path)


def test_each_fine_tuning_and_pre_training_has_a_probe_of_its_own(folder, monkeypatch):
    """A sweep that is started again with other settings keeps its folder."""
    probed = []
    monkeypatch.setattr(probes, "do_probe", lambda cfg: probed.append(cfg) or given(cfg))
    assert len(probes.probe_checkpoints(str(folder))) == len(probed) == 4
    assert len(probes.probe_checkpoints(str(folder), "short")) == 4 and len(probed) == 8
    sweep = state.read_sweep(str(folder))
    for run in sweep.plan.runs.values():
        later = f"{run.folder[:-12]}{'0' * 12}"
        shutil.copytree(run.folder, later)
        product = os.path.join(later, os.path.basename(run.product))
        sweep.plan.runs[run.id] = dataclasses.replace(run, folder=later, product=product)
    state.write_sweep(str(folder), sweep)
    assert len(probes.probe_checkpoints(str(folder))) == 4 and len(probed) == 12


def test_the_folder_of_a_config_may_contain_an_equals_sign(folder, tmp_path, monkeypatch):
    probed = []
    monkeypatch.setattr(probes, "do_probe", lambda cfg: probed.append(cfg) or given(cfg))
    sweep = state.read_sweep(str(folder))
    config = tmp_path / "lr=0.1/det.py"
    config.parent.mkdir()
    shutil.copy(ROOT / "configs/common/train.py", config)
    for run in sweep.plan.runs.values():
        (task,) = run.tasks
        at = task.index("--config-file") + 1
        later = (*task[:at], str(config), *(t for t in task[at + 1 :] if t.startswith("train.")))
        sweep.plan.runs[run.id] = dataclasses.replace(run, tasks=(later,))
    state.write_sweep(str(folder), sweep)
    assert len(probes.probe_checkpoints(str(folder))) == len(probed) == 4


def test_only_checkpoints_that_all_seeds_have_fine_tuned(folder, monkeypatch):
    monkeypatch.setattr(probes, "do_probe", given)
    plan = state.read_sweep(str(folder)).plan
    runs = [plan.runs[e["run"]] for e in plan.entries if e["kind"] == FINETUNE]
    for run in runs:
        if run.name == "det_moco_seed0_det_seed1":
            Path(run.product).unlink()
    found = probes.probe_checkpoints(str(folder))
    assert [c.labels[:2] for c in found] == [("moco", 1), ("byol", 0), ("byol", 1)]
    with pytest.raises(UserError, match=r"no fine-tuning 'dat' in .*; it has det, short"):
        probes.probe_checkpoints(str(folder), "dat")
    with pytest.raises(UserError, match="no metric 'AP'; known: bbox/AP, "):
        probes.probe_checkpoints(str(folder), metric="AP")
    for run in runs:
        Path(run.product).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no pre-training of .* has been fine-tuned yet"):
        probes.probe_checkpoints(str(folder))


def test_command_line_probes_the_weights_on_the_data_of_the_fine_tuning(folder):
    torch.manual_seed(0)
    model = instantiate(load_config(DETECTOR).model)
    plan = state.read_sweep(str(folder)).plan
    for entry in plan.entries:
        if entry["kind"] == PRETRAIN:
            torch.save({"model": model.state_dict()}, plan.runs[entry["run"]].product)
    command = [sys.executable, str(ROOT / "tools/sweep.py"), "probes", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = list(csv.DictReader((folder / "probes.csv").read_text().splitlines()))
    # The same weights and boxes: equal probes, whose correlation is 0.
    for level in ("trunk", "fpn", "head"):
        values = {line[f"knn_{level}"] for line in lines}
        assert len(values) == 1 and 0 < float(values.pop()) < 1
    assert "| retrieval_fpn " in done.stdout and str(folder / "probes.csv") in done.stdout
    (path,) = (folder / "probes").glob("det_byol_seed1_det_seed*/probe.json")
    probed = json.loads(path.read_text())
    assert (probed["train"]["images"], probed["test"]["images"]) == (6, 6)
    assert probed["levels"]["head"]["weights"] == "loaded"
