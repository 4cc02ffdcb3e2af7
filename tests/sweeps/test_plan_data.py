"""The data of a sweep's runs: several data sets, code that registers them, files that must exist."""

import pytest
from sweep_plans import DETECTOR, SOCO, entries, sweep

from region_pretrain.sweeps.graph import PRETRAIN, REGIONS
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
