import pytest
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.config import apply_overrides, dotted_keys, load_config
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
def test_what_does_not_fit_is_refused_with_a_hint(override, message):
    cfg = make_config()
    with pytest.raises(UserError, match=message):
        apply_overrides(cfg, [override])
    assert cfg == make_config()


def test_a_group_may_be_replaced_by_a_group_or_null():
    cfg = apply_overrides(make_config(), ["train.amp={enabled: true}", "dataloader.test=null"])
    assert cfg.train.amp.enabled is True and cfg.dataloader.test is None


def test_files(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("train = dict(max_iter=1)\n")
    cfg = load_config(str(path), ["train.max_iter=2", "train.amp.enabled=true"])
    assert (cfg.train.max_iter, cfg.train.amp.enabled) == (2, True)  # also what it left to defaults
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
