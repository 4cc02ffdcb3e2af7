"""Seeds of a sweep's plan: fine-tunings per pre-training, trials, and lengths of pre-training."""

import pytest
from sweep_plans import BYOL, DETECTOR, MOCO, RATES, entries, overrides, sweep

from region_pretrain.errors import UserError
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, TRIAL
from region_pretrain.sweeps.plan import make_plan


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """2 pre-training seeds x 3 fine-tuning seeds, and trials with 3 seeds."""
    det = {"config": DETECTOR, **RATES, "label_fractions": [1.0, 0.5], "seeds": [0, 1, 7]}
    weights = tmp_path_factory.mktemp("weights") / "x.pth"
    weights.touch()
    return make_plan(
        sweep(
            tmp_path_factory.mktemp("seeded"),
            pretrain={"moco": {"config": MOCO}, "byol": {"config": BYOL}},
            baselines={"random": {}, "file": {"init_checkpoint": str(weights)}},
            finetune={"det": {**det, "learning_rate_seeds": [1000, 1001, 1002]}},
            seeds=[0, 1],
        )
    )


def test_fine_tuning_seeds_per_pre_training(seeded):
    names = [run.name for run in seeded.runs.values()]
    for init in ("moco_labels0.5", "byol"):
        assert [n for n in names if n.startswith(f"{init}_seed") and "_det_" in n] == [
            f"{init}_seed{p}_det_seed{f}" for p in (0, 1) for f in (0, 1, 7)
        ]
    # The sweep does not pre-train these, so pre-training seeds do not repeat them.
    for init in ("random_labels0.5", "file"):
        found = [n for n in names if n.startswith(f"{init}_det_")]
        assert found == [f"{init}_det_seed{f}" for f in (0, 1, 7)]
    weights = {(e["init"], e["seed"]): e["run"] for e in seeded.entries if e["kind"] == PRETRAIN}
    for entry in seeded.entries:
        if entry["kind"] not in (FINETUNE, TRIAL):
            continue
        run, baseline = seeded.runs[entry["run"]], entry["init"] in ("random", "file")
        assert ("pretrain_seed" in entry) == (not baseline)
        assert overrides(run)["train.seed"] == str(entry["seed"])
        parents = [p for p in run.parents if p in weights.values()]
        assert parents == ([] if baseline else [weights[entry["init"], entry["pretrain_seed"]]])


def test_all_initialisations_share_subset_and_order_of_a_fine_tuning_seed(seeded):
    found = {}
    for entry in seeded.entries:
        if entry["kind"] == FINETUNE:
            values = overrides(seeded.runs[entry["run"]])
            values.pop("train.init_checkpoint", None), values.pop("train.output_dir")
            found.setdefault((entry["label_fraction"], entry["seed"]), []).append(values)
    # 2 methods x 2 pre-training seeds, and 2 baselines
    assert len(found) == 6 and all(len(runs) == 2 * 2 + 2 for runs in found.values())
    for (fraction, seed), runs in found.items():
        assert all(run == runs[0] for run in runs)
        subset = runs[0].get("dataloader.train.dataset.seed")
        assert subset == (str(seed) if fraction < 1 else None)
        assert runs[0]["train.seed"] == str(seed)


def test_trials_of_several_seeds_use_the_pre_trainings_in_turn(seeded):
    how = {"init": "moco", "label_fraction": 1.0}
    trials = [e for e in seeded.entries if e["kind"] == TRIAL and how.items() <= e.items()]
    seeds = [(e["learning_rate"], e["seed"], e["pretrain_seed"]) for e in trials]
    assert seeds == [(r, s, p) for r in (0.05, 0.1) for s, p in ((1000, 0), (1001, 1), (1002, 0))]
    runs = [seeded.runs[e["run"]] for e in trials]
    assert [r.name for r in runs[:3]] == [f"moco_lr0.05_seed{s}" for s in (1000, 1001, 1002)]
    (choice,) = entries(seeded, CHOICE, **how)
    assert set(choice.parents) == {run.id for run in runs}
    pairs = [f"{e['learning_rate']:g}={r.product}" for e, r in zip(trials, runs, strict=True)]
    assert list(choice.tasks[0][-6:]) == pairs


def test_more_fine_tuning_seeds_reuse_the_runs_of_a_sweep(tmp_path):
    """The default: one fine-tuning per pre-training, with its seed. Names as they always were."""
    det = {"config": DETECTOR, **RATES, "seeds": [0, 1]}
    changes = {"baselines": {"random": {}}, "seeds": [0, 1], "regions": {"shards": 3}}
    plan = make_plan(sweep(tmp_path, **changes))
    more = make_plan(sweep(tmp_path, finetune={"det": det}, **changes))
    names = {run.id: run.name for run in more.runs.values()}
    assert {run.name: names[run.id] for run in entries(plan, FINETUNE)} == {
        "random_seed0_det": "random_det_seed0",
        "random_seed1_det": "random_det_seed1",
        "soco_seed0_det": "soco_seed0_det_seed0",
        "soco_seed1_det": "soco_seed1_det_seed1",
    }
    assert len(more.runs) == len(plan.runs) + 2 and set(plan.runs) <= set(more.runs)


def test_pre_trainings_of_several_lengths(tmp_path):
    pretrain = {
        "quarter": {"config": MOCO, "images_seen": 96, "method": "MoCo v2"},
        "full": {"config": MOCO, "method": "MoCo v2"},
    }
    given = sweep(tmp_path, pretrain=pretrain, finetune={})
    steps = [overrides(run)["train.max_iter"] for run in make_plan(given).runs.values()]
    assert steps == ["3", "10"] and set(given.methods.values()) == {"MoCo v2"}
    pretrain["quarter"]["images_seen"] = 100
    with pytest.raises(UserError, match="sweep.pretrain.quarter.images_seen=100 is not a multiple"):
        make_plan(sweep(tmp_path, pretrain=pretrain, finetune={}))
