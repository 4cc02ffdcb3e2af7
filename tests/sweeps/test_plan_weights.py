"""Weights and detectors that do not fit are found when a sweep is planned."""

import dataclasses
import warnings

import pytest
from sweep_plans import DETECTOR, SOCO, entries, sweep

from region_pretrain.config import load_config
from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import jobs, state
from region_pretrain.sweeps.graph import FINETUNE
from region_pretrain.sweeps.plan import make_plan


def test_a_detector_of_detectron2s_model_zoo(tmp_path):
    """Its overrides in upper case are applied before the others; jobs keep the name."""
    zoo = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    entry = {"config": zoo, "overrides": ["optimizer.lr=0.5", "SOLVER.BASE_LR=0.1"]}
    weights = tmp_path / "mine.pth"
    weights.touch()
    unfrozen = ["MODEL.BACKBONE.FREEZE_AT=0", "MODEL.RESNETS.NORM=SyncBN", "MODEL.FPN.NORM=SyncBN"]

    def planned(**baselines):
        return make_plan(sweep(tmp_path, pretrain={}, finetune={"det": entry}, baselines=baselines))

    found = planned(mine={"init_checkpoint": str(weights)})
    (run,) = entries(found, FINETUNE, init="mine")
    made = state.SweepFile("s", "s", "", Cluster(), str(tmp_path), "/", {}, None, found)
    (job,) = jobs.tool_jobs(run, made)
    assert job.arguments[:2] == ["--config-file", zoo]
    cfg = load_config(zoo, job.arguments[2:])
    assert (cfg.optimizer.lr, cfg.model.cfg.SOLVER.BASE_LR) == (0.5, 0.1)
    assert cfg.train.init_checkpoint == str(weights)
    found = planned(random={"finetune_overrides": unfrozen})
    (run,) = entries(found, FINETUNE, init="random")
    (job,) = jobs.tool_jobs(run, dataclasses.replace(made, plan=found))
    assert load_config(zoo, []).train.init_checkpoint.endswith("R-50.pkl")
    assert load_config(zoo, job.arguments[2:]).train.init_checkpoint == ""
    message = (
        "sweep.baselines.random has no init_checkpoint, and the detector's config freezes layers "
        f"without weights .*: add {' '.join(unfrozen[:2])}, .*into sweep.baselines.random.fine"
    )
    with pytest.raises(UserError, match=message):
        planned(random={})
    entry["overrides"].append("train.init_checkpoint=mine.pth")  # on purpose
    (run,) = entries(planned(random={}), FINETUNE, init="random")
    assert load_config(zoo, run.tasks[0][2:]).train.init_checkpoint == "mine.pth"
    with pytest.raises(UserError, match="no key 'MODEL.MASK'"):
        make_plan(sweep(tmp_path, finetune={"det": {**entry, "overrides": ["MODEL.MASK=1"]}}))


def test_a_plan_is_made_without_warnings(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_plan(
            sweep(tmp_path, finetune={"det": {"config": DETECTOR, "overrides": ["train.seed=7"]}})
        )
    assert [str(w.message) for w in caught if "no-op" in str(w.message)] == []


def test_weights_that_will_not_load_are_refused_before_the_pre_training(tmp_path):
    other = {"config": "configs/detection/faster_rcnn_r50_fpn_4conv1fc.py"}
    with pytest.raises(UserError, match=f"weights of {SOCO} would not load into the detector of "
                       f"{other['config']}: the file .* tensors differ in shape"):  # fmt: skip
        make_plan(sweep(tmp_path, finetune={"det": other}))
