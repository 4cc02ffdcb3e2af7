"""A sweep says which of its runs have been computed with other settings."""

import json
import os
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from sweep_plans import DETECTOR, MOCO, RATES, SOCO, entries, sweep

from region_pretrain.config import load_config, to_yaml
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.regions.writing import write_store
from region_pretrain.sweeps import submission
from region_pretrain.sweeps.earlier import describe_earlier
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, REGIONS, TRIAL
from region_pretrain.sweeps.plan import make_plan
from region_pretrain.sweeps.state import finished_at

PARTS = ("train", "test")


def make(folder, **changes):
    values = {"finetune": {"det": {"config": DETECTOR}}, "baselines": {"random": {}}}
    return make_plan(sweep(folder, **{**values, **changes}))


def compute(run, *without):
    """Write what a training of the run leaves, without some keys of its config."""
    os.makedirs(run.folder)
    if run.kind == REGIONS:
        write_store(run.product, [], {"recipe": load_config(SOCO).dataloader.train.dataset.recipe})
    if run.kind == CHOICE:
        Path(run.product).touch()
    if run.kind in (REGIONS, CHOICE):
        return
    cfg = load_config(run.tasks[0][1], [a for a in run.tasks[0][2:] if not a.startswith("@")])
    for key in without:
        parent, _, last = key.rpartition(".")
        OmegaConf.select(cfg, parent).pop(last)
    Path(run.folder, "config.yaml").write_text(to_yaml(cfg))
    Path(run.folder, "metrics.json").write_text(json.dumps({"iteration": 0}) + "\n")
    Path(run.product).touch()


def names(lines):
    return [re.match(r"  (.+)-[0-9a-f]{12}: ", line)[1] for line in lines[1:]]


def test_nothing_is_said_of_new_runs_and_of_the_same_runs(tmp_path):
    plan = make(tmp_path)
    assert describe_earlier(plan) == []
    for run in plan.runs.values():
        compute(run)
    assert describe_earlier(plan) == describe_earlier(make(tmp_path)) == []
    assert describe_earlier(make(tmp_path, seeds=[0, 1])) == []  # more runs, but no other ones


def test_changed_settings_are_named_with_both_values(tmp_path):
    for run in make(tmp_path).runs.values():
        compute(run)
    lines = describe_earlier(make(tmp_path, images_seen=640))
    kept = os.path.join(tmp_path, "runs")
    start = "2 runs have been computed with other settings"
    assert lines[0] == f"{start}, kept in {kept}, and are computed again:"
    assert names(lines) == ["soco_seed0", "soco_seed0_det"]
    # The steps of the schedule follow from the number of iterations.
    assert lines[1].partition(": ")[2] == "train.max_iter: 10 -> 20"
    assert lines[2].partition(": ")[2] == "another pre-training, checkpoint or region store"


def test_a_default_that_a_new_version_added(tmp_path):
    """The digest of a run changes with it, so the run would silently be computed again."""
    old = make(tmp_path, finetune_overrides=["+train.invented=3"])
    for run in old.runs.values():
        compute(run, *(["train.clip_grad"] if run.kind == FINETUNE else []))
    new = make(tmp_path, finetune_overrides=["+train.invented=[4,5]"])
    lines = describe_earlier(new)
    assert names(lines) == ["random_seed0_det", "soco_seed0_det"]
    assert "train.invented: 3 -> [4, 5]" in lines[1]
    assert "train.clip_grad: (absent) -> {" in lines[1]
    (run,) = entries(old, FINETUNE, init="random")
    Path(run.folder, "config.yaml").unlink()
    assert "its config.yaml cannot be read" in "\n".join(describe_earlier(new))


def test_the_newest_earlier_run_counts_and_names_are_compared_exactly(tmp_path):
    both = {"soco": {"config": SOCO}, "soco-x": {"config": SOCO, "images_seen": 960}}
    for images in (320, 640):
        plan = make(tmp_path, images_seen=images, pretrain=both)
        for i, run in enumerate(plan.runs.values()):
            if not os.path.exists(run.folder):
                compute(run)
                os.utime(run.folder, (images + i, images + i))
    lines = describe_earlier(make(tmp_path, images_seen=1280, pretrain=both))
    assert names(lines) == ["soco_seed0", "soco_seed0_det"]
    assert lines[1].endswith(": train.max_iter: 20 -> 40")


def test_files_that_were_replaced_after_the_results(coco_folder, tmp_path):
    weights, split = tmp_path / "w/model_final.pth", tmp_path / "split.json"
    annotations = coco_folder.rename(tmp_path / "a&b") / "ann.json"
    split.write_text('{"50": {"0": ["2", "8"], "1": ["9", "77"]}}')
    weights.parent.mkdir()
    weights.touch()
    data = f"coco://{tmp_path}/a%26b/ann.json?images={tmp_path}/a%26b/images"
    plan = make(
        tmp_path / "out",
        seeds=[0, 1],
        baselines={"random": {}, "own": {"init_checkpoint": f"{weights.parent}?part=teacher"}},
        finetune={
            "det": {
                "config": DETECTOR,
                "overrides": [f"dataloader.{part}.dataset.names='{data}'" for part in PARTS],
                "label_fractions": [0.5],
                "label_split": str(split),
            }
        },
    )
    for run in plan.runs.values():
        compute(run)
    assert describe_earlier(plan) == []
    tuned = [run for run in plan.runs.values() if run.kind == FINETUNE]
    mine = [os.path.basename(run.folder) for run in tuned if run.name.startswith("own")]
    later = os.path.getmtime(tuned[-1].product) + 1
    os.utime(weights, (later, later))
    assert describe_earlier(plan) == [
        f"{weights} is newer than the results of 2 finished runs, which are not computed again; "
        f"for that, delete in {tmp_path}/out/runs: {' '.join(mine)}"
    ]
    for path in (annotations, split):
        os.utime(path, (later, later))
    of = {str(annotations): "6", str(split): "6", str(weights): "2"}
    assert {line.split()[0]: line.split()[7] for line in describe_earlier(plan)} == of
    os.remove(tuned[0].product)  # it is computed again anyway
    assert sum("of 5 finished" in line for line in describe_earlier(plan)) == 2


def test_regions_of_replaced_annotations_are_outdated_too(coco_folder, tmp_path):
    """Else the pre-training would read the boxes of the old annotations once more."""
    data = f"coco://{coco_folder}/ann.json?images={coco_folder}/images"
    names = f"dataloader.train.dataset.names='{data}'"
    plan = make(tmp_path, pretrain={"soco": {"config": SOCO, "overrides": [names]}})
    for run in plan.runs.values():
        compute(run)
    assert describe_earlier(plan) == []
    later = os.path.getmtime(run.product) + 1
    os.utime(coco_folder / "ann.json", (later, later))
    (said,) = describe_earlier(plan)
    assert said.startswith(f"{coco_folder}/ann.json is newer than the results of 3 finished runs")
    found = {name.rpartition("-")[0] for name in said.partition("runs: ")[2].split()}
    assert found == {"regions_soco", "soco_seed0", "soco_seed0_det"}


def test_only_data_and_weights_count(tmp_path, monkeypatch):
    """Not a tracker's file, which each run appends to, nor a file called like some other value."""
    log = tmp_path / "log"
    writer = f"{{_target_:builtins.print,path:{log}}}"
    overrides = [f"train.writers=[json,console,{writer}]"]
    plan = make(tmp_path / "out", pretrain_overrides=overrides, finetune_overrides=overrides)
    for run in plan.runs.values():
        compute(run)
    monkeypatch.chdir(tmp_path)
    later = os.path.getmtime(run.product) + 1
    for name in ("log", "console", "cpu"):
        Path(name).touch()
        os.utime(name, (later, later))
    assert describe_earlier(plan) == []


def test_a_copied_sweep_is_as_old_as_its_original(tmp_path):
    """``cp -r`` gives all files the time of the copy, in any order."""
    plan = make(tmp_path)
    for i, run in enumerate(plan.runs.values()):
        compute(run)
        attempt = {"job": "1", "restart": 0, "host": "x", "started": 100.0 * i, "start": ""}
        attempt |= {"ended": 100.0 * i + 50, "outcome": "finished", "stop": ""}
        Path(run.folder, "attempts.json").write_text(json.dumps([attempt]))
        os.utime(run.product, (1e9 - i, 1e9 - i))
    assert describe_earlier(plan) == []


def test_only_a_finished_attempt_tells_when_a_run_ended(tmp_path):
    """A failed run may have been completed by hand, which records no attempt."""
    (run,) = entries(make(tmp_path), FINETUNE, init="soco")
    compute(run)
    attempt = {"job": "1", "restart": 0, "host": "x", "started": 1.0, "start": "", "ended": 2.0}
    for outcome, ended in (("failed", 1e9), ("finished", 2.0)):
        attempt |= {"outcome": outcome, "stop": ""}
        Path(run.folder, "attempts.json").write_text(json.dumps([attempt]))
        os.utime(run.product, (1e9, 1e9))
        assert finished_at(run) == ended


def test_a_product_is_older_than_the_end_of_its_process(tmp_path):
    """A picture drawn from it while the process is still leaving is not drawn again."""
    (run,) = entries(make(tmp_path), FINETUNE, init="soco")
    compute(run)
    attempt = {"job": "1", "restart": 0, "host": "x", "started": 1.0, "start": "", "ended": 9.0}
    attempt |= {"outcome": "finished", "stop": ""}
    Path(run.folder, "attempts.json").write_text(json.dumps([attempt]))
    os.utime(run.product, (5.0, 5.0))
    assert finished_at(run) == 5.0


def test_what_follows_from_an_outdated_run_is_outdated(tmp_path):
    """Else the fine-tunings would keep the learning rate or the weights of the replaced file."""
    weights = tmp_path / "w.pth"
    weights.touch()
    plan = make(
        tmp_path / "out",
        pretrain={
            "soco": {"config": SOCO, "overrides": [f"train.init_checkpoint={weights}"]},
            "moco": {"config": MOCO},
        },
        finetune={"det": {"config": DETECTOR, **RATES}},
    )
    for run in plan.runs.values():
        compute(run)
    later = os.path.getmtime(run.product) + 1
    os.utime(weights, (later, later))
    (said,) = describe_earlier(plan)
    found = [name.rpartition("-")[0] for name in said.partition("runs: ")[2].split()]
    soco = [run.name for run in plan.runs.values() if "soco" in run.name and run.kind != REGIONS]
    assert found == soco and len(soco) == 5  # with two trials and their choice
    # Only the pre-training was deleted and computed again, then also the trials.
    os.utime(weights, (0, 0))
    (pretrained,) = entries(plan, PRETRAIN, init="soco")
    os.utime(pretrained.product, (later, later))
    (said,) = describe_earlier(plan)
    assert said.startswith(f"{pretrained.product} is newer than the results of 4 finished")
    for run in entries(plan, TRIAL, init="soco"):
        os.utime(run.product, (later + 1, later + 1))
    assert all("of 2 finished" in line for line in describe_earlier(plan)[:2])


def test_many_runs_are_counted(tmp_path):
    changes = {"pretrain": {"moco": {"config": MOCO}}, "seeds": [0, 1, 2, 3]}
    for run in make(tmp_path, **changes).runs.values():
        compute(run)
    lines = describe_earlier(make(tmp_path, images_seen=640, **changes))
    assert lines[0].startswith("8 runs have") and len(lines) == 7 and lines[-1] == "  and 3 more"


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_a_dry_run_begins_with_them(tmp_path, kind):
    one = sweep(
        tmp_path, finetune={"det": {"config": DETECTOR}}, pretrain={"moco": {"config": MOCO}}
    )
    for run in make_plan(one).runs.values():
        compute(run)
    cluster = Cluster(kind=kind, **({"partition": "main"} if kind == "slurm" else {}))
    assert submission.dry_run(submission.describe(one, cluster, ""), str(tmp_path)) == ""
    other = sweep(
        tmp_path, finetune={"det": {"config": DETECTOR}}, pretrain={"moco": {"config": MOCO}},
        pretrain_overrides=["optimizer.lr=0.5"],
    )  # fmt: skip
    text = submission.dry_run(submission.describe(other, cluster, ""), str(tmp_path))
    first, second, *_ = text.splitlines()
    (old,) = entries(make_plan(one), PRETRAIN)
    assert first.startswith("# 2 runs have been computed with other settings, kept in ")
    assert second.startswith(f"#   {os.path.basename(old.folder)}: optimizer.lr: ")
    assert second.endswith(" -> 0.5") and "\n\n# moco_seed0\n" in text


def test_the_chosen_learning_rate_is_not_a_setting_that_changed(tmp_path):
    """It is in the saved config, and the command names the file of the choice instead."""
    det = {"det": {"config": DETECTOR, **RATES}}
    values = {"finetune": det, "pretrain": {"moco": {"config": MOCO}}, "baselines": {}}
    for run in make(tmp_path, **values).runs.values():
        compute(run, *(["optimizer.lr"] if run.kind == FINETUNE else []))
    lines = describe_earlier(make(tmp_path, images_seen=640, **values))
    text = dict(zip(names(lines), lines[1:], strict=True))
    assert "optimizer.lr" not in text["moco_seed0_det"]
    assert text["moco_seed0_det"].endswith(": another pre-training, checkpoint or region store")
