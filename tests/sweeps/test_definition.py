"""A sweep's file: what is read from it, and what is said about a mistake."""

import pytest

from region_pretrain.errors import UserError
from region_pretrain.sweeps.definition import load_sweep, parse_sweep

FILE = """
sweep = dict(
    pretrain=dict(one=dict(config="a.py", label="One"), two=dict(config="b.py")),
    baselines=dict(random=dict()),
    finetune=dict(det=dict(config="d.py", rates=[0.1], fractions=[1.0, 0.1])),
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
    assert list(sweep.pretrain) == ["one"] and sweep.label("one") == "One"
    assert sweep.label("random") == "random" and sweep.baselines["random"].init_checkpoint == ""
    assert (sweep.seeds, sweep.images_seen, sweep.title) == ((3,), 640, "T")
    det = sweep.finetune["det"]
    assert (det.rates, det.fractions, det.checkpoints) == ((0.1,), (1.0, 0.1), "final")
    assert sweep.regions.shards == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep.sedes=[1]", "no key 'sweep.sedes'.*sweep.seeds"),
        ("+sweep.finetune.det.rate=0.1", "no key sweep.finetune.det.rate.*rates"),
        ("sweep.seeds=[]", "sweep.seeds"),
        ("sweep.seeds=[1,1]", "sweep.seeds.*twice"),
        ("sweep.seeds=[a]", "sweep.seeds.*numbers"),
        ("sweep.images_seen=many", "sweep.images_seen"),
        ("sweep.finetune.det.fractions=[0.0]", r"fractions=.*\(0, 1\]"),
        ("sweep.finetune.det.rates=[0.1,0.2]", "held_out must say which split"),
        ("sweep.finetune.det.rates=[-1]", "above 0"),
        ("+sweep.finetune.det.checkpoints=last", "checkpoints='last'"),
        ("+sweep.finetune.det.metric=AP", "task/metric"),
        ("+sweep.pretrain.random={config: c.py}", "both have random"),
        ("+sweep.pretrain.three={label: x}", "sweep.pretrain.three has no config"),
        ("+sweep.pretrain.two.label=One", "same label"),
        ("+sweep.pretrain.two.overrides=train.seed=1", "form key=value|must be a list"),
        ("sweep.regions.shards=0", "shards"),
    ],
)
def test_a_mistake_is_named(file, override, said):
    with pytest.raises(UserError, match=said):
        load_sweep(file, [override])


def test_files_that_are_no_sweeps(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        load_sweep(str(tmp_path / "absent.py"))
    (tmp_path / "other.py").write_text("model = dict()")
    with pytest.raises(UserError, match="no dict called sweep"):
        load_sweep(str(tmp_path / "other.py"))
    with pytest.raises(UserError, match="neither"):
        parse_sweep({}, "x")
    with pytest.raises(UserError, match="letters"):
        parse_sweep({"baselines": {"a/b": {}}}, "x")
