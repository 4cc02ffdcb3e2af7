"""Pre-trainings of a sweep that start from another one."""

import dataclasses
import shlex

import pytest
from sweep_plans import DETECTOR, MOCO, SOCO, entries, overrides, sweep

from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import state, submission
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, REGIONS, Plan
from region_pretrain.sweeps.plan import make_plan


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """MoCo v2 from SoCo from MoCo v2, and MoCo v2 from random weights; listed last to first."""
    pretrain = {
        "third": {"config": MOCO, "init_from": "second"},
        "second": {"config": SOCO, "init_from": "first"},
        "first": {"config": MOCO},
    }
    det = {"config": DETECTOR}
    folder = tmp_path_factory.mktemp("chain")
    return make_plan(sweep(folder, pretrain=pretrain, finetune={"det": det}, seeds=[0, 1]))


def test_a_pre_training_continues_another_of_the_same_seed(chain):
    (regions,) = entries(chain, REGIONS)
    for seed in (0, 1):
        (first,), (second,), (third,), (det,) = (
            entries(chain, kind, init=init, seed=seed)
            for kind, init in (
                *((PRETRAIN, init) for init in ("first", "second", "third")),
                (FINETUNE, "third"),
            )
        )
        assert first.parents == () and "train.init_checkpoint" not in overrides(first)
        assert set(second.parents) == {regions.id, first.id} and third.parents == (second.id,)
        assert det.parents == (third.id,)
        for run, start in ((second, first), (third, second), (det, third)):
            assert overrides(run)["train.init_checkpoint"] == start.product
        assert first.id != third.id  # the same config from other weights
    assert len({run.id for run in entries(chain, PRETRAIN)}) == 6
    order = list(chain.runs)
    assert all(order.index(p) < order.index(r.id) for r in chain.runs.values() for p in r.parents)


def test_a_chain_does_not_depend_on_names_and_folders(chain, tmp_path):
    pretrain = {
        "a": {"config": MOCO},
        "b": {"config": SOCO, "init_from": "a"},
        "same": {"config": SOCO, "init_from": "a"},
    }
    found = make_plan(sweep(tmp_path, pretrain=pretrain, finetune={}))
    assert set(found.runs) <= set(chain.runs) and len(found.runs) == 3
    pretrain["b"]["init_from"] = None
    other = make_plan(sweep(tmp_path, pretrain=pretrain, finetune={}))
    assert len(set(other.runs) - set(found.runs)) == 1


def test_lengths_of_a_chain_differ(tmp_path):
    def described(init_from):
        pretrain = {"a": {"config": MOCO}, "b": {"config": MOCO, "init_from": init_from}}
        made = sweep(tmp_path, pretrain=pretrain, finetune={})
        return submission.describe(made, Cluster(), "").images_seen

    assert described(None) == 320 and described("a") is None


def test_a_chain_in_slurm_arrays_and_in_a_dry_run(chain, tmp_path):
    groups = submission.missing(chain, dict.fromkeys(chain.runs, state.WAITING))
    shown = [([r.name for r in runs], [a.name for a in after]) for runs, after in groups]
    assert shown[:6] == [
        (["regions_second"], []),
        (["first_seed0", "first_seed1"], []),
        (["second_seed0"], ["regions_second", "first_seed0"]),
        (["second_seed1"], ["regions_second", "first_seed1"]),
        (["first_seed0_det"], ["first_seed0"]),
        (["first_seed1_det"], ["first_seed1"]),
    ]
    assert (["third_seed1"], ["second_seed1"]) in shown
    cluster = Cluster(kind="slurm", partition="gpu")
    made = state.SweepFile("s", "s", "", cluster, "/code", "/", {}, None, chain)
    text = submission.dry_run(made, str(tmp_path / "out"))
    assert "# third_seed1 (after second_seed1)" in text and "afterok:<second_seed1>" in text
    (second,), (third,) = (entries(chain, PRETRAIN, init=i, seed=1) for i in ("second", "third"))
    assert f"train.init_checkpoint={second.product}" in text
    # The commands can be pasted into a shell, which would expand {a,b}.
    lines = text.splitlines()
    command = lines[lines.index("# third_seed1 (after second_seed1)") + 1]
    assert shlex.split(command)[-len(third.tasks[0]) + 2 :] == list(third.tasks[0][2:])
    (first,) = entries(chain, FINETUNE, init="first", seed=0)
    names = "dataloader.train.dataset.names={_target_:a.b,size:3,side:96}"
    task = (*first.tasks[0], names)
    plan = Plan({first.id: dataclasses.replace(first, tasks=(task,), parents=())})
    shown = submission.dry_run(dataclasses.replace(made, plan=plan), str(tmp_path / "out"))
    assert f" '{names}'\n" in shown
