import pytest
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config as get_detectron2_config
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.config import (
    CONFIG_ROOT,
    apply_overrides,
    changed_keys,
    complete_train,
    dotted_keys,
    get_config,
    load_config,
    load_file,
    to_yaml,
)
from region_pretrain.errors import UserError


def make_config():
    return OmegaConf.create(
        {
            "model": L(nn.Linear)(in_features=3, out_features="${train.width}"),
            "train": {"width": 4, "max_iter": None, "amp": {"enabled": False}, "steps": [1, 2]},
            "dataloader": {"train": {"num_workers": 2}, "test": {"num_workers": 2}},
            "same": "${train}",
        },
        flags={"allow_objects": True},
    )


def test_known_keys_are_set_in_hydras_grammar():
    cfg = apply_overrides(
        make_config(),
        [
            "train.max_iter=100",  # null before
            "train.amp.enabled=true",
            "train.steps=[3,4,5]",
            "train.steps.1=7",
            "model.out_features=9",  # an interpolation before
            "same.width=5",  # through an interpolation
        ],
    )
    assert cfg.train.max_iter == 100
    assert cfg.train.amp.enabled is True
    assert cfg.train.steps == [3, 7, 5]
    assert cfg.model.out_features == 9
    assert cfg.same.width == 5


def test_new_keys_need_a_plus():
    cfg = apply_overrides(make_config(), ["+model.bias=false", "+train.clip={max_norm: 1.0}"])
    assert cfg.model.bias is False and cfg.train.clip.max_norm == 1.0


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_iters=3", r"no key 'train.max_iters'.*did you mean train.max_iter"),
        ("num_workers=3", r"did you mean dataloader.train.num_workers, dataloader.test.num_worke"),
        ("trian.width=3", r"did you mean train.width"),
        ("train.width.deep=3", r"no key 'train.width.deep'"),
        ("train.steps.2=3", r"no key 'train.steps.2'"),
        ("zzz=3", r"no key 'zzz' in the config; to add it: \+zzz="),
        ("train.amp=true", r"train.amp is a group.*train.amp.enabled"),
        ("train.width", r"'train.width' is not of the form key=value"),
        ("~train.width", r"'~train.width'"),
        ("--resume", r"'--resume' is not of the form"),
    ],
)
def test_invalid_overrides_are_refused_with_a_hint(override, message):
    cfg = make_config()
    with pytest.raises(UserError, match=message):
        apply_overrides(cfg, [override])
    assert cfg == make_config()


def test_a_group_may_be_replaced_by_a_group_or_null():
    cfg = apply_overrides(make_config(), ["train.amp={enabled: true}", "dataloader.test=null"])
    assert cfg.train.amp.enabled is True and cfg.dataloader.test is None


def test_a_file_is_loaded_completed_and_overridden(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("train = dict(max_iter=1)\n")
    cfg = load_config(str(path), ["train.max_iter=2", "train.amp.enabled=true"])
    assert (cfg.train.max_iter, cfg.train.amp.enabled) == (2, True)  # the file lacks amp
    with pytest.raises(UserError, match="no config file .*absent.py"):
        load_config(str(tmp_path / "absent.py"))
    with pytest.raises(UserError, match="--config-file"):
        load_config("")


def test_dotted_keys_lists_groups_and_leaves():
    assert list(dotted_keys({"a": {"b": [1, {"c": 2}]}})) == [
        "a",
        "a.b",
        "a.b.0",
        "a.b.1",
        "a.b.1.c",
    ]


def test_missing_keys_take_their_defaults():
    cfg = complete_train(OmegaConf.create({"train": {"max_iter": 5, "amp": {"enabled": True}}}))
    assert cfg.train.max_iter == 5
    assert cfg.train.amp == {"enabled": True, "dtype": "bfloat16"}
    defaults = get_config("common/train.py").train
    assert cfg.train.keys() == defaults.keys()
    assert cfg.train.checkpointer == defaults.checkpointer
    train = cfg.train
    assert complete_train(cfg).train is train  # nothing left to do


def test_detectron2s_own_train_config_is_understood():
    cfg = OmegaConf.create({"train": get_detectron2_config("common/train.py").train})
    complete_train(cfg)
    assert cfg.train.checkpointer == {"period": 5000, "max_to_keep": 100}
    assert cfg.train.checkpointer.keys() == get_config("common/train.py").train.checkpointer.keys()
    assert cfg.train.max_iter == 90000


def test_every_key_of_the_shipped_train_config_has_a_comment():
    lines = (CONFIG_ROOT / "common/train.py").read_text().splitlines()
    for key in get_config("common/train.py").train:
        (n,) = [n for n, line in enumerate(lines) if line.startswith(f"    {key}=")]
        assert lines[n - 1].strip().startswith("#"), key


def test_a_config_that_cannot_be_saved_is_refused():
    cfg = make_config()
    cfg.model.bias = lambda: 0
    with pytest.raises(UserError, match="instead of lambdas"):
        to_yaml(cfg)


def test_changed_keys_compares_leaves():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 1}], "gone": 0}
    new = {"a": {"b": 2, "c": [1, 2, 3]}, "d": [{"e": 1}], "new": None}
    assert changed_keys(OmegaConf.create(old), OmegaConf.create(new)) == {
        "a.b": ("1", "2"),
        "a.c": ("[1, 2]", "[1, 2, 3]"),
        "gone": ("0", "(absent)"),
        "new": ("(absent)", "None"),
    }


def test_a_class_and_its_saved_name_are_equal(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(make_config()))
    assert changed_keys(load_file(str(path)), make_config()) == {}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {max_iter: 3")
    with pytest.raises(UserError, match="config.yaml cannot be loaded: ParserError"):
        load_file(str(path))
