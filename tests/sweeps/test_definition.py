"""Sweep files: the values read from them, and the error for each mistake."""

import pytest

from region_pretrain.errors import UserError
from region_pretrain.sweeps.definition import load_sweep, parse_sweep

FILE = """
sweep = dict(
    pretrain=dict(one=dict(config="a.py", label="One"), two=dict(config="b.py")),
    baselines=dict(random=dict()),
    finetune=dict(det=dict(config="d.py", learning_rates=[0.1], label_fractions=[1.0, 0.1])),
    seeds=[0, 1],
)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return str(path)


def test_values_defaults_and_overrides(file):
    sweep = load_sweep(
        file,
        ["sweep.seeds=[3]", "sweep.pretrain.two=null", "sweep.images_seen=640", "sweep.title=T"],
    )
    assert (sweep.name, sweep.output_dir) == ("mine", "output/sweeps/mine")
    assert list(sweep.pretrain) == ["one"] and sweep.labels == {"random": "random", "one": "One"}
    assert sweep.baselines["random"].init_checkpoint == ""
    assert (sweep.seeds, sweep.images_seen, sweep.title) == ([3], 640, "T")
    det = sweep.finetune["det"]
    assert (det.learning_rates, det.label_fractions) == ([0.1], [1.0, 0.1])
    assert (det.checkpoints, det.learning_rate_seeds, det.overrides) == ("final", [1000], [])
    assert det.seeds == []
    assert sweep.regions.shards == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.sedes=[1]", "no key 'sweep.sedes'.*sweep.seeds"),
        ("+sweep.finetune.det.rates=0.1", "no key sweep.finetune.det.rates.*mean learning_rates"),
        ("+sweep.finetune.det.x=0.1", "no key sweep.finetune.det.x .*known keys: config, .*metric"),
        ("sweep.seeds=[]", "sweep.seeds"),
        ("sweep.seeds=[1,1]", "sweep.seeds.*twice"),
        ("sweep.seeds=[a]", r"sweep.seeds\[0\]: Value 'a' .*Integer"),
        ("sweep.seeds=[1.5]", r"sweep.seeds\[0\]: Value '1.5' .*Integer"),
        ("sweep.seeds=[true]", r"sweep.seeds\[0\]: Value 'True' .*Integer"),
        ("sweep.images_seen=many", "sweep.images_seen: Value 'many' .*Integer"),
        ("sweep.images_seen=1.5", "sweep.images_seen: Value '1.5' .*Integer"),
        ("sweep.finetune.det.label_fractions=[0.0]", r"label_fractions=.*\(0, 1\]"),
        ("sweep.finetune.det.label_fractions=[]", r"label_fractions=.*\(0, 1\]"),
        ("sweep.finetune.det.label_fractions=[x]", r"det.label_fractions\[0\]: Value 'x' .*Float"),
        ("sweep.finetune.det.label_fractions=[1,1]", "label_fractions.*twice"),
        ("sweep.finetune.det.learning_rates=[0.1,0.2]", "held_out must name the split"),
        ("sweep.finetune.det.learning_rates=[-1]", "above 0"),
        ("sweep.finetune.det.learning_rate_seeds=[]", "det.learning_rate_seeds=.*at least one"),
        ("sweep.finetune.det.learning_rate_seeds=[5,5]", "det.learning_rate_seeds.*twice"),
        ("sweep.finetune.det.seeds=[3,3]", "sweep.finetune.det.seeds=.*twice"),
        ("sweep.finetune.det.seeds=2", "sweep.finetune.det.seeds: must be a list"),
        ("sweep.finetune.det.checkpoints=last", "checkpoints='last'"),
        ("sweep.finetune.det.metric=AP", "task/metric"),
        ("sweep.finetune.det.metric=bbox/ap", "metric='bbox/ap': is written bbox/AP, segm/AP50"),
        ("+sweep.pretrain.random={config: c.py}", "both have random"),
        ("+sweep.pretrain.three={label: x}", "sweep.pretrain.three has no config"),
        ("sweep.pretrain.two.label=One", "same label"),
        ("sweep.pretrain.two.overrides=train.seed", "sweep.pretrain.two.overrides: must be a list"),
        ("+sweep.pretrain.four=four.py", "sweep.pretrain.four: must be a dict"),
        ("sweep.pretrain.two.overrides=train.seed=1", "form key=value"),
        ("sweep.pretrain=[one.py]", "sweep.pretrain=.*Cannot merge"),
        ("sweep.regions.shards=0", "shards"),
        ("sweep.regions.arguments=[--working-size,500]", "has --working-size, but the recipe is"),
        ("sweep.regions.arguments=['--set=min_side=9']", "to its overrides"),
        (
            "+sweep.pretrain.two.init_from=three",
            "sweep.pretrain.two.init_from=three: sweep.pretrain has no three, only one, two$",
        ),
        (
            "+sweep.pretrain.two.init_from=random",
            "two.init_from=random: random is a baseline; .*train.init_checkpoint=FILE to overrides",
        ),
        ("+sweep.pretrain.two.init_from=two", "sweep.pretrain: init_from is circular: two -> two$"),
    ],
)
def test_a_mistake_is_named(file, override, message):
    with pytest.raises(UserError, match=message):
        load_sweep(file, [override])


def test_chains_of_pre_trainings(file):
    sweep = load_sweep(file, ["+sweep.pretrain.two.init_from=one"])
    assert (sweep.pretrain["one"].init_from, sweep.pretrain["two"].init_from) == (None, "one")

    def changed(*chains, **two):
        entries = {name: {"config": "a.py", "init_from": source} for name, source in chains}
        return parse_sweep({"pretrain": entries | ({"two": two} if two else {})}, "x")

    changed(("c", "b"), ("b", "a"), ("a", None))
    with pytest.raises(UserError, match="sweep.pretrain: init_from is circular: b -> a -> b$"):
        changed(("d", None), ("c", "b"), ("b", "a"), ("a", "b"))
    weights = ["optimizer.lr=1", "train.init_checkpoint=x.pth"]
    with pytest.raises(UserError, match="two.init_from=a and the override train.init_checkpoint="):
        changed(("a", None), config="a.py", init_from="a", overrides=weights)
    # Without the start, the rest of the sweep is not run from random weights.
    with pytest.raises(UserError, match="two.init_from=one: sweep.pretrain has no one"):
        load_sweep(file, ["+sweep.pretrain.two.init_from=one", "sweep.pretrain.one=null"])


def test_files_that_are_not_sweeps(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        load_sweep(str(tmp_path / "absent.py"))
    (tmp_path / "other.py").write_text("model = dict()")
    with pytest.raises(UserError, match="must define a dict called sweep"):
        load_sweep(str(tmp_path / "other.py"))
    with pytest.raises(UserError, match="neither"):
        parse_sweep({}, "x")
    with pytest.raises(UserError, match="sweep.pretrain: must be a dict"):
        parse_sweep({"pretrain": ["one.py"]}, "x")
    with pytest.raises(UserError, match="letters"):
        parse_sweep({"baselines": {"a/b": {}}}, "x")


def test_null_takes_entries_and_values_back_to_their_defaults(file):
    sweep = load_sweep(
        file, ["sweep.baselines=null", "sweep.seeds=null", "sweep.pretrain.one=null"]
    )
    assert (sweep.baselines, sweep.seeds, list(sweep.pretrain)) == ({}, [0], ["two"])


def test_fine_tunings_share_one_checkpoint_period():
    entries = {name: {"config": "d.py", "checkpoints": int(name)} for name in "45"}
    with pytest.raises(UserError, match=r"checkpoints=\[4, 5\]: .*the same period"):
        parse_sweep({"baselines": {"random": {}}, "finetune": entries}, "x")
