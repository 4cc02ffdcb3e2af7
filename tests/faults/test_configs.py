"""A config.yaml runs nothing when it is read, and a damaged one is one line."""

import functools
import glob
import os

import pytest
import torch
import yaml
from damage import changes, fuzz, outcome
from detectron2 import model_zoo
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from hypothesis import given
from omegaconf import DictConfig, OmegaConf
from tiny_run import make_config

from region_pretrain.config import CONFIG_ROOT, complete_train, load_config, load_file, to_yaml
from region_pretrain.engine.output_dir import claim_output_dir, save_config
from region_pretrain.errors import UserError
from region_pretrain.lazy import load_plain_yaml, load_yaml

ATTACKS = [
    "!!python/object/apply:os.mkdir [{path}]",
    "!!python/object/new:os.mkdir [{path}]",
    "!!python/object/apply:subprocess.check_call [[mkdir, {path}]]",
    "!!python/object/apply:builtins.exec ['import os; os.mkdir(\"{path}\")']",
    "!!python/object/new:functools.partial {{args: [!!python/object/apply:os.mkdir [{path}]]}}",
    "!!python/object/apply:functools.partial {{args: [!!python/name:os.mkdir ''], "
    "listitems: [{path}]}}",
    "!!python/object/new:type {{args: [z, !!python/tuple [], {{extend: !!python/name:os.mkdir }}], "
    "listitems: [{path}]}}",
    "!!python/object:detectron2.layers.shape_spec.ShapeSpec "
    "{{channels: !!python/object/apply:os.mkdir [{path}]}}",
    "!!python/module:antigravity",
]


def claim(folder, resume=True):
    cfg = complete_train(make_config(folder))
    folder.mkdir(exist_ok=True)
    claim_output_dir(cfg, resume)
    save_config(cfg)  # as a run does when its checkpoint has been read
    return cfg


@pytest.mark.parametrize("attack", ATTACKS)
def test_reading_a_config_runs_nothing(tmp_path, attack):
    run, path = tmp_path / "run", tmp_path / "pwned"
    claim(run, resume=False)
    (run / "metrics.json").write_text('{"iteration": 0}\n')
    text = (run / "config.yaml").read_text() + "x: " + attack.format(path=path) + "\n"
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml cannot be loaded") as error:
        load_config(str(run / "config.yaml"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot resume with a config that differs .*x: "):
        claim(run)
    assert not path.exists()


def test_a_target_of_a_config_is_not_called_by_reading_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{_target_: os.mkdir, path: {tmp_path}/pwned}}\n")
    assert load_config(str(path)).model._target_ == "os.mkdir"
    assert not (tmp_path / "pwned").exists()


def test_values_that_detectron2_saves_are_read_again(tmp_path):
    saved = {
        "a": (1, (2, "x")),
        "b": functools.partial(torch.nn.LayerNorm, eps=1e-6),
        "c": ShapeSpec(channels=3, stride=4),
        "d": torch.nn.ReLU,
        "e": [1e-3, None, True],
    }
    path = tmp_path / "x.yaml"
    LazyConfig.save(DictConfig(saved, flags={"allow_objects": True}), str(path))
    assert "!!python/object/apply:functools.partial" in path.read_text()
    read = load_yaml(path.read_text())
    assert read["b"].func is torch.nn.LayerNorm and read["b"].keywords == {"eps": 1e-6}
    assert {**read, "b": 0} == {**saved, "b": 0, "a": [1, [2, "x"]]}  # OmegaConf has no tuples
    assert load_plain_yaml(path.read_text())["d"] == "torch.nn.modules.activation.ReLU"
    text = yaml.dump({"a": saved["a"]})
    assert load_yaml(text) == load_plain_yaml(text) == {"a": (1, (2, "x"))}


def test_paths_that_are_not_utf_8_come_back(tmp_path):
    """Their bytes are surrogates, whose escapes libyaml refuses."""
    folder = os.fsdecode(b"/data/\xe9tudes")
    text = to_yaml(OmegaConf.create({"train": {"output_dir": folder}, "a": "é 😀"}))
    assert "\\uDCE9" in text
    for read in (load_yaml, load_plain_yaml):
        assert read(text) == {"train": {"output_dir": folder}, "a": "é 😀"}
        assert read('"\\ud83d"') == "\ud83d" and read('"\\u00e9"') == "é"


def test_shipped_and_zoo_configs_read_as_with_detectron2s_loader(tmp_path):
    zoo = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    files = [
        str(CONFIG_ROOT / "detection/mask_rcnn_vitdet_b.py"),
        str(CONFIG_ROOT / "detection/mask_rcnn_r50_c4_moco.py"),
        *glob.glob(f"{zoo}/COCO-*/*regnet*.py"),
    ]
    assert len(files) >= 4
    for file in files:
        LazyConfig.save(LazyConfig.load(file), str(tmp_path / "x.yaml"))
        text = (tmp_path / "x.yaml").read_text()
        assert "!!python/" in text
        assert repr(load_yaml(text)) == repr(yaml.unsafe_load(text))


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1, 2]", b"7", b"train: 3", b"\xff\xfe\x00MODEL:", b"a: [" * 5000]
)
def test_a_damaged_config_is_one_line(tmp_path, content):
    claim(tmp_path, resume=False)
    (tmp_path / "metrics.json").write_text('{"iteration": 0}\n')
    (tmp_path / "config.yaml").write_bytes(content)
    for action in (lambda: load_config(str(tmp_path / "config.yaml")), lambda: claim(tmp_path)):
        error = outcome(action)
        assert isinstance(error, UserError) and "config.yaml" in str(error)
    assert (tmp_path / "config.yaml").read_bytes() == content


def test_a_run_without_its_config_is_neither_overwritten_nor_resumed_silently(tmp_path, caplog):
    claim(tmp_path, resume=False)
    os.remove(tmp_path / "config.yaml")
    (tmp_path / "model_final.pth").write_bytes(b"precious")
    with pytest.raises(UserError, match="already contains a run"):
        claim(tmp_path, resume=False)
    assert not (tmp_path / "config.yaml").exists()
    claim(tmp_path)
    assert "config.yaml is missing" in caplog.text and "learning rate" in caplog.text


def test_fuzzed_configs(tmp_path):
    claim(tmp_path, resume=False)
    (tmp_path / "metrics.json").write_text('{"iteration": 0}\n')
    path = tmp_path / "config.yaml"
    data = path.read_bytes()

    @fuzz(80)
    @given(change=changes())
    def run(change):
        path.write_bytes(change(data))
        outcome(lambda: load_file(str(path)))
        path.write_bytes(change(data))
        found = outcome(lambda: claim(tmp_path))
        if not isinstance(found, UserError):
            assert path.read_bytes() == data  # the given config, to the byte

    run()
