"""Making a run longer, also a finished one."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.engine import HookBase
from tiny_run import make_config

from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def final(folder) -> dict:
    return torch.load(folder / "model_final.pth", weights_only=True)


def longer(folder, **train):
    cfg = make_config(folder, **train)
    cfg.train.epochs = 2 * cfg.train.epochs
    return cfg


def test_a_finished_run_becomes_longer(tmp_path, caplog):
    do_pretrain(make_config(tmp_path / "run"))
    before = final(tmp_path / "run")
    assert before["iteration"] == 19
    with pytest.raises(UserError, match="train.epochs: 4 -> 8.*train.allow_new_length=True to mak"):
        do_pretrain(longer(tmp_path / "run"), resume=True)
    assert final(tmp_path / "run")["iteration"] == 19
    do_pretrain(longer(tmp_path / "run", allow_new_length=True), resume=True)
    assert [line["iteration"] for line in lines(tmp_path / "run")] == list(range(40))
    assert final(tmp_path / "run")["iteration"] == 39

    # The rates are those of a run that had the new length from the start.
    do_pretrain(longer(tmp_path / "at_once"))
    rates = [line["lr"] for line in lines(tmp_path / "at_once")]
    assert [line["lr"] for line in lines(tmp_path / "run")][20:] == rates[20:]
    assert rates[20] > lines(tmp_path / "run")[19]["lr"]


def test_a_refused_resume_leaves_the_config_as_it_was(tmp_path):
    do_pretrain(make_config(tmp_path))
    before = (tmp_path / "config.yaml").read_bytes()
    shorter = make_config(tmp_path, allow_new_length=True)
    shorter.train.epochs = shorter.train.epochs // 2
    with pytest.raises(UserError, match="max_iter=20, now it is 10: a run cannot become shorter: "):
        do_pretrain(shorter, resume=True)
    assert (tmp_path / "config.yaml").read_bytes() == before
    do_pretrain(make_config(tmp_path), resume=True)  # the first command still works
    do_pretrain(longer(tmp_path, allow_new_length=True), resume=True)
    assert b"epochs: 8" in (tmp_path / "config.yaml").read_bytes()


def test_another_learning_rate_may_be_given(tmp_path):
    do_pretrain(make_config(tmp_path))
    first = [line["lr"] for line in lines(tmp_path)]
    cfg = longer(tmp_path, allow_new_length=True)
    do_pretrain(longer(tmp_path / "at_once"))
    at_once = [line["lr"] for line in lines(tmp_path / "at_once")]
    cfg.optimizer.lr = cfg.optimizer.lr / 4
    do_pretrain(cfg, resume=True)
    rates = [line["lr"] for line in lines(tmp_path)]
    assert rates == first + [pytest.approx(lr / 4) for lr in at_once[20:]]


def test_another_learning_rate_needs_another_length(tmp_path):
    do_pretrain(make_config(tmp_path))
    cfg = make_config(tmp_path, allow_new_length=True)
    cfg.optimizer.lr = cfg.optimizer.lr / 4
    with pytest.raises(UserError, match="optimizer.lr: .* Undo the change or choose another"):
        do_pretrain(cfg, resume=True)


class Interrupt(HookBase):
    def after_step(self):
        if self.trainer.iter == 29:
            raise RuntimeError("interrupted")


def test_another_learning_rate_may_be_given_after_the_first_new_checkpoint(tmp_path):
    do_pretrain(make_config(tmp_path))
    cfg = longer(tmp_path, allow_new_length=True)
    with pytest.raises(RuntimeError, match="interrupted"):
        do_pretrain(cfg, resume=True, hooks=[Interrupt()])
    before = [line["lr"] for line in lines(tmp_path)]
    newest = (tmp_path / "last_checkpoint").read_text()
    start = int(newest.removeprefix("model_").removesuffix(".pth")) + 1
    assert 20 < start < 30
    cfg = longer(tmp_path, allow_new_length=True)
    cfg.optimizer.lr = cfg.optimizer.lr / 4
    do_pretrain(cfg, resume=True)
    do_pretrain(longer(tmp_path / "at_once"))
    at_once = [line["lr"] for line in lines(tmp_path / "at_once")]
    rates = [line["lr"] for line in lines(tmp_path)]
    assert rates[:start] == before[:start]
    assert rates[start:] == [pytest.approx(lr / 4) for lr in at_once[start:]]


def test_a_run_does_not_become_shorter(tmp_path):
    do_pretrain(make_config(tmp_path / "run"))
    cfg = make_config(tmp_path / "run", allow_new_length=True)
    cfg.train.epochs = 2
    with pytest.raises(UserError, match="max_iter=20, now it is 10"):
        do_pretrain(cfg, resume=True)
