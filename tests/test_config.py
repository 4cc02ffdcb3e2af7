import builtins

import pytest
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config as get_detectron2_config
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.config import (
    CONFIG_ROOT,
    changed_keys,
    complete_train,
    get_config,
    load_config,
    load_file,
    read_saved,
    to_yaml,
)
from region_pretrain.engine.build import resolve_max_iter
from region_pretrain.errors import UserError
from region_pretrain.shipped import ROOT


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


def test_a_file_is_loaded_completed_and_overridden(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("train = dict(max_iter=1)\n")
    cfg = load_config(str(path), ["train.max_iter=2", "train.amp.enabled=true"])
    assert (cfg.train.max_iter, cfg.train.amp.enabled) == (2, True)  # the file lacks amp
    with pytest.raises(UserError, match="no config file .*absent.py"):
        load_config(str(tmp_path / "absent.py"))
    with pytest.raises(UserError, match="--config-file"):
        load_config("")


def test_misspelt_keys_of_a_config_are_pointed_out_once(caplog):
    given = {"accumulate_stepz": 4, "amp": {"dtypes": "float16"}, "my_own": {"dtype": 1}}
    for _ in range(2):
        complete_train(OmegaConf.create({"train": given}))
    assert sorted(record.getMessage() for record in caplog.records) == [
        "train.accumulate_stepz has no effect; did you mean train.accumulate_steps?",
        "train.amp.dtypes has no effect; did you mean train.amp.dtype?",
    ]
    caplog.clear()
    complete_train(OmegaConf.create({"train": get_detectron2_config("common/train.py").train}))
    for path in (CONFIG_ROOT / "detection").glob("*.py"):
        complete_train(load_file(str(path)))
    assert not caplog.records


def test_the_length_is_the_one_that_was_overridden(tmp_path):
    """Detection configs have train.max_iter, which would hide an override of train.epochs."""
    detector = "configs/detection/mask_rcnn_r50_fpn_4conv1fc.py"

    def length(path, *overrides):
        train = load_config(path, overrides).train
        return train.max_iter, train.epochs

    assert length(detector) == (90_000, None)
    assert length(detector, "train.epochs=20") == (None, 20)
    assert length(detector, "train.epochs=20", "train.max_iter=9") == (9, 20)
    assert length(detector, "train.epochs=null") == (90_000, None)
    zoo = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    assert length(zoo, "train.epochs=20") == (None, 20)
    assert length(zoo, "SOLVER.MAX_ITER=9", "train.epochs=20") == (9, 20)
    cfg = load_config(detector, ["train.epochs=20", f"train.output_dir={tmp_path}"])
    assert resolve_max_iter(cfg.train, 500 // 16) == 620


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "SOLVER.MAX_ITER"),
        ("configs/detection/mask_rcnn_r50_fpn_4conv1fc.py", "train.max_iter"),
    ],
)
def test_two_lengths_among_the_overrides_are_pointed_out(path, key, caplog):
    """A sweep may rely on it: its images_seen, and the epochs of which the warm-up is a part."""
    cfg = load_config(path, ["train.epochs=0.25", f"{key}=100"])
    assert (cfg.train.max_iter, cfg.train.epochs) == (100, 0.25)
    assert caplog.messages == [
        f"{key}=100 is the length of the run, not train.epochs=0.25, which is set as well: remove "
        "one of them"
    ]
    caplog.clear()
    load_config(path, ["train.epochs=null", f"{key}=100"])
    cfg = load_config(path, ["train.epochs=2", f"{key}=100", "train.max_iter=null"])
    assert cfg.train.max_iter is None and caplog.messages == []


def test_a_file_with_two_lengths_is_pointed_out(tmp_path, caplog):
    """One of them is probably that of the config it begins with."""
    path = tmp_path / "mine.py"
    path.write_text("train = dict(max_iter=90_000)\ntrain['epochs'] = 50\n")
    load_config(str(path))
    assert caplog.messages == [
        f"{path}: train.max_iter=90000 is the length of the run, not train.epochs=50; to train for "
        "epochs, set train.max_iter = None in the file"
    ]
    caplog.clear()
    assert load_config(str(path), ["train.epochs=60"]).train.max_iter is None
    load_config(str(path), ["train.max_iter=9"])
    for shipped in ROOT.glob("projects/*/configs/*_shapes.py"):
        load_config(str(shipped))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("imported", "reason"),
    [
        (
            "my_package.models",
            "ModuleNotFoundError: No module named 'my_package'; is its folder on PYTHONPATH?",
        ),
        (
            ".base",
            "SyntaxError: Config file {}/base.py has syntax error! Line 2: invalid syntax",
        ),
    ],
)
def test_a_file_that_cannot_be_loaded_says_why(tmp_path, imported, reason):
    (tmp_path / "base.py").write_text("model = dict(\n    width=3,,\n)\n")
    path = tmp_path / "mine.py"
    path.write_text(f"from {imported} import model\n")
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert str(error.value) == f"{path} cannot be loaded: {reason.format(tmp_path)}"


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


def test_configs_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    """As on Windows, where text is written as cp1252 by default."""
    real = open

    def opened(file, mode="r", buffering=-1, encoding=None, *args, **kwargs):
        encoding = encoding if "b" in mode else encoding or "cp1252"
        return real(file, mode, buffering, encoding, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", opened)
    path = tmp_path / "mine.yaml"
    cfg = make_config()
    cfg.train.output_dir = "Größe/写真"
    text = to_yaml(cfg)
    assert "Größe/写真" in text
    path.write_bytes(text.encode())
    assert load_file(str(path)).train.output_dir == "Größe/写真"
    assert read_saved(str(path))["train"]["output_dir"] == "Größe/写真"


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
