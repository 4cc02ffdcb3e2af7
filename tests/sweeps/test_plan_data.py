"""What a sweep's runs read: several data sets, code that registers them, files that must exist."""

import json

import cv2
import numpy as np
import pytest
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from sweep_plans import DETECTOR, RATES, SOCO, entries, sweep

from region_pretrain.config import load_config
from region_pretrain.errors import UserError
from region_pretrain.sweeps.definition import load_sweep
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, REGIONS
from region_pretrain.sweeps.plan import make_plan

NAMES = "dataloader.train.dataset.names"


def test_regions_of_several_data_sets(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    names = f"{NAMES}=['folder://{folders[0]}','folder://{folders[1]}']"
    changes = {"pretrain": {"soco": {"config": SOCO, "overrides": [names]}}, "finetune": {}}
    plan = make_plan(sweep(tmp_path / "out", **changes))
    (regions,), (pretrain,) = entries(plan, REGIONS), entries(plan, PRETRAIN)
    assert names in regions.tasks[0] and names in pretrain.tasks[0]
    assert pretrain.parents == (regions.id,)


REGISTER = """
from detectron2.data import DatasetCatalog, MetadataCatalog
DatasetCatalog.register("NAME", lambda: [])
MetadataCatalog.get("NAME").thing_classes = ["a", "b", "c", "d", "e", "f"]
"""


@pytest.mark.parametrize("by", ["the sweep file", "an override"])
def test_jobs_execute_what_registers_their_data(tmp_path, by):
    """A job does not load the sweep file, and reads a copy of the config of the user's own."""
    name = f"photos of {by}".replace(" ", "_")
    registers = REGISTER.replace("NAME", name)
    file, code = tmp_path / "mine.py", tmp_path / "it's, [mine].py"
    code.write_text(registers)
    data = [f"dataloader.{split}.dataset.names={name}" for split in ("train", "test")]
    more = [f"train.register={json.dumps([str(code)])}"] if by == "an override" else []
    values = dict(
        pretrain=dict(soco=dict(config=SOCO, overrides=[*more, data[0]])),
        finetune=dict(det=dict(config=DETECTOR, overrides=[*more, *data])),
        output_dir=str(tmp_path / "out"),
    )
    file.write_text(f"{'' if more else registers}\nsweep = {values!r}\n")
    try:
        runs = list(make_plan(load_sweep(str(file))).runs.values())
        assert [run.kind for run in runs] == [REGIONS, PRETRAIN, FINETUNE]
        for run in runs:
            (task,) = run.tasks
            own = [word for word in task if word.startswith("train.register=")]
            cfg = load_config(DETECTOR, own[-1:])
            assert list(cfg.train.register) == [str(code if more else file)], run.kind
    finally:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_what_registers_the_data_does_not_change_a_run(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("")
    register = [f"train.register=[{code}]"]
    more = {"pretrain_overrides": register, "finetune_overrides": register}
    assert set(make_plan(sweep(tmp_path, **more)).runs) == set(make_plan(sweep(tmp_path)).runs)


def test_learning_rates_are_not_chosen_on_the_data_of_the_results(tmp_path):
    det = {"config": DETECTOR, "learning_rates": [0.05, 0.1], "held_out": ["train.eval_period=0"]}
    with pytest.raises(UserError, match="det.held_out=.*evaluated on the data of the results"):
        make_plan(sweep(tmp_path, finetune={"det": det}))


def test_the_mends_of_the_engines_errors_do_not_change_a_run(tmp_path):
    def ids(*overrides):
        more = {"pretrain_overrides": overrides, "finetune_overrides": overrides}
        return set(make_plan(sweep(tmp_path, **more)).runs)

    harmless = ("allow_changed_data=true", "allow_new_length=true", "checkpoint_minutes=10")
    assert ids(*(f"train.{key}" for key in harmless)) == ids()
    for key in ("checkpoint_keep_every=5", "max_unreadable=0.5"):
        found = ids(f"train.{key}")
        assert len(found - ids()) == len(found) - 1, key  # all but the regions


@pytest.mark.parametrize("query", ["", "?part=student"])
def test_weights_of_a_baseline_must_exist(tmp_path, query):
    def planned(path):
        baselines = {"file": {"init_checkpoint": f"{path}{query}"}}
        det = {"config": DETECTOR}
        return make_plan(sweep(tmp_path, pretrain={}, baselines=baselines, finetune={"det": det}))

    with pytest.raises(UserError, match="file.init_checkpoint: there is no absent.pth: name"):
        planned("absent.pth")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match=f"init_checkpoint: there is no {run}/model_final.pth"):
        planned(run)
    newest = run / "model_0000009.pth"
    newest.touch()
    with pytest.raises(UserError, match=f"is not finished: .* its newest weights, {newest}"):
        planned(run)
    for path in (newest, "zoo://absent", "https://absent/r50.pth"):
        assert len(planned(path).runs) == 1
    (run / "model_final.pth").touch()
    for path in (run, run / "model_final.pth"):
        assert len(planned(path).runs) == 1


def test_a_split_file_must_have_all_fractions_and_seeds(tmp_path):
    split = tmp_path / "split.json"
    det = {"config": DETECTOR, **RATES, "label_fractions": [1.0, 0.1], "label_split": str(split)}
    values = {"pretrain": {}, "baselines": {"random": {}}, "finetune": {"det": det}, "seeds": [3]}
    with pytest.raises(UserError, match=r"finetune.det.label_split=.*: no such split file: .*json"):
        make_plan(sweep(tmp_path, **values))
    lists = {"3": [1, 2]}
    split.write_text(json.dumps({"10": lists}))
    with pytest.raises(UserError, match="there is no seed=1000; it has seed 3"):  # of the trials
        make_plan(sweep(tmp_path, **values))
    split.write_text(json.dumps({"10": {**lists, "1000": [3]}}))
    assert len(entries(make_plan(sweep(tmp_path, **values)), FINETUNE)) == 2


def test_fractions_of_coco_have_lengths_and_seeds_of_their_own():
    """Without the data: each run reads it when it starts."""
    plan = make_plan(load_sweep("configs/sweeps/coco_labels.py"))
    assert [len(entries(plan, kind)) for kind in (REGIONS, PRETRAIN, FINETUNE)] == [1, 2, 48]
    lengths = {}
    for entry in plan.entries:
        if entry["kind"] == FINETUNE:
            (task,) = plan.runs[entry["run"]].tasks
            cfg = load_config(task[1], [word for word in task[2:] if not word.startswith("--")])
            data = cfg.dataloader.train.dataset
            assert (data.fraction, data.seed) == (entry["label_fraction"], entry["seed"])
            length, factor = cfg.train.max_iter, instantiate(cfg.lr_multiplier)
            found = [factor(i / length) for i in (250, 501)]
            assert found == pytest.approx([0.5005, 1.0], abs=1e-4)
            lengths.setdefault(entry["label_fraction"], set()).add(length)
    assert lengths == {0.01: {3000}, 0.02: {4000}, 0.05: {5500}, 0.1: {10000}}


def test_labels_that_cannot_be_used_are_reported_before_any_run(tmp_path):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), np.zeros((64, 64, 3), np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 24, 24], "area": 576}
    box |= {"iscrowd": 0}
    mask = {**box, "segmentation": [[8, 8, 32, 8, 32, 32, 8, 32]]}

    def data(annotations):
        name = f"{len(list(tmp_path.glob('*.json')))}.json"
        labels = {"annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        labels["images"] = [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}]
        (tmp_path / name).write_text(json.dumps(labels))
        return f"coco://{tmp_path / name}?images={tmp_path / 'images'}"

    def planned(config, train, test):
        splits = {"train": data(train), "test": data(test)}
        names = [f"dataloader.{split}.dataset.names={name}" for split, name in splits.items()]
        det = {"config": config, "overrides": names}
        return make_plan(sweep(tmp_path / "sweep", finetune={"det": det}))

    boxes_only = DETECTOR.replace("mask_rcnn", "faster_rcnn")
    with pytest.raises(UserError, match="1 of 1 boxes have no mask .* mask AP cannot be computed"):
        planned(DETECTOR, [mask], [box])
    with pytest.raises(UserError, match="1 of 1 boxes have no mask .*mask_head learns masks"):
        planned(DETECTOR, [box], [mask])
    with pytest.raises(UserError, match="has no boxes, so its AP is undefined"):
        planned(boxes_only, [box], [])
    with pytest.raises(UserError, match="has no boxes: it cannot be trained on"):
        planned(boxes_only, [], [box])
    kinds = ["regions", "pretrain", "finetune"]
    some = {**box, "id": 2}  # a subset of the labels may be trained on
    for plan in (
        planned(boxes_only, [box], [box]),
        planned(DETECTOR, [mask], [mask]),
        planned(DETECTOR, [mask, some], [mask]),
    ):
        assert [run.kind for run in plan.runs.values()] == kinds
