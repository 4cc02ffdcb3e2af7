import logging
import random

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.model_zoo import get_config as get_detectron2_config
from omegaconf import OmegaConf
from tiny_run import make_config

from region_pretrain.config import changed_keys, complete_train, config_text, get_config
from region_pretrain.engine.setup import holds_run, resolve_device, start_run
from region_pretrain.errors import UserError


def begin(folder, resume=False, **train):
    cfg = complete_train(make_config(folder, **train))
    start_run(cfg, resume)
    return cfg


def make_progress(folder):
    (folder / "metrics.json").write_text('{"iteration": 0}\n')


def test_defaults_fill_up_what_a_config_leaves_out():
    cfg = complete_train(OmegaConf.create({"train": {"max_iter": 5, "amp": {"enabled": True}}}))
    assert cfg.train.max_iter == 5
    assert cfg.train.amp == {"enabled": True, "dtype": "bfloat16"}
    defaults = get_config("common/train.py").train
    assert cfg.train.keys() == defaults.keys()
    assert cfg.train.checkpointer == defaults.checkpointer
    assert complete_train(cfg.copy()) == cfg


def test_detectron2s_own_train_config_is_understood():
    cfg = OmegaConf.create({"train": get_detectron2_config("common/train.py").train})
    complete_train(cfg)
    assert cfg.train.checkpointer == {
        **get_config("common/train.py").train.checkpointer,
        "period": 5000,
        "keep_last": 100,
    }
    assert cfg.train.max_iter == 90000


def test_every_key_of_the_shipped_train_config_has_a_comment():
    from region_pretrain.config import CONFIG_ROOT

    lines = (CONFIG_ROOT / "common/train.py").read_text().splitlines()
    for key in get_config("common/train.py").train:
        (n,) = [n for n, line in enumerate(lines) if line.startswith(f"    {key}=")]
        assert lines[n - 1].strip().startswith("#"), key


def test_config_is_saved_and_loads_as_it_was(tmp_path):
    cfg = begin(tmp_path)
    assert LazyConfig.load(str(tmp_path / "config.yaml")).train == cfg.train
    assert (tmp_path / "log.txt").stat().st_size > 0


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    begin(tmp_path)
    begin(tmp_path)  # nothing has happened yet, so nothing can be lost
    assert not holds_run(str(tmp_path))
    make_progress(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        begin(tmp_path, seed=5)
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"log_period": 50},
        {"checkpointer": {"period": 1, "minutes": 3, "keep_last": 9}},
        {"eval_period": 7},
        {"device": None},
        {"compile": True},
    ],
)
def test_resume_accepts_the_same_config_and_harmless_changes(tmp_path, train):
    begin(tmp_path)
    make_progress(tmp_path)
    cfg = begin(tmp_path, resume=True, **train)
    assert LazyConfig.load(str(tmp_path / "config.yaml")).train == cfg.train


def test_resume_accepts_another_number_of_workers(tmp_path):
    cfg = make_config(tmp_path)
    cfg.dataloader.train.num_workers = 2
    start_run(complete_train(cfg), False)
    make_progress(tmp_path)
    cfg.dataloader.train.num_workers = 8
    start_run(cfg, True)


def test_resume_refuses_another_config_and_lists_the_changes(tmp_path):
    begin(tmp_path)
    make_progress(tmp_path)
    cfg = complete_train(make_config(tmp_path, seed=3, epochs=8))
    cfg.model.noise = 0.2
    cfg.optimizer.momentum = 0.5
    with pytest.raises(UserError) as error:
        start_run(cfg, True)
    for part in (
        "model.noise: 0.1 -> 0.2",
        "optimizer.momentum: (absent) -> 0.5",
        "train.seed: 0 -> 3",
        "train.epochs: 4 -> 8",
    ):
        assert part in str(error.value)
    assert "log_period" not in str(error.value)


def test_a_drawn_seed_is_noted_and_kept_on_resume(tmp_path):
    cfg = begin(tmp_path, seed=None)
    assert isinstance(cfg.train.seed, int)
    make_progress(tmp_path)
    assert begin(tmp_path, resume=True, seed=None).train.seed == cfg.train.seed
    other = begin(tmp_path / "other", seed=None)
    assert other.train.seed != cfg.train.seed


def test_all_generators_start_from_the_seed(tmp_path):
    draws = []
    for _ in range(2):
        begin(tmp_path, seed=3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_a_config_that_cannot_be_saved_is_refused(tmp_path):
    cfg = complete_train(make_config(tmp_path))
    cfg.model.noise = lambda: 0
    with pytest.raises(UserError, match="no lambdas"):
        config_text(cfg)


def test_an_unwritable_folder_is_an_error_of_the_user(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="train.output_dir=.*file/run cannot be written"):
        begin(tmp_path / "file" / "run")


def test_a_second_run_in_the_process_logs_to_its_own_folder(tmp_path):
    begin(tmp_path / "a")
    begin(tmp_path / "b")
    logging.getLogger("region_pretrain.test").info("only in b")
    assert "only in b" in (tmp_path / "b" / "log.txt").read_text()
    assert "only in b" not in (tmp_path / "a" / "log.txt").read_text()


def test_changed_keys_compares_leaves():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 1}], "gone": 0}
    new = {"a": {"b": 2, "c": [1, 2, 3]}, "d": [{"e": 1}], "new": None}
    assert changed_keys(old, new) == {
        "a.b": ("1", "2"),
        "a.c": ("[1, 2]", "[1, 2, 3]"),
        "gone": ("0", "(absent)"),
        "new": ("(absent)", "None"),
    }


def test_device(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == resolve_device("cpu") == torch.device("cpu")
    assert not caplog.records
    assert resolve_device("cuda") == torch.device("cpu")
    assert "there is no GPU" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert resolve_device(None) == resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="train.device=gpu"):
        resolve_device("gpu")
