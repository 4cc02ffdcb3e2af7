import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.config import LazyCall as L
from equality import equal
from tiny_run import (
    CLOCK,
    KillAt,
    KillInSave,
    Poison,
    TinyMethod,
    final_checkpoint,
    make_config,
    train_in_process,
)
from torch import nn

from region_pretrain.engine.environment import read_machine
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import launch
from region_pretrain.errors import UserError
from region_pretrain.modeling.heads import VectorNorm
from region_pretrain.progress import read_progress

CHILD = (
    "import json, sys, tiny_run; "
    "tiny_run.train_in_process(sys.argv[1], False, json.loads(sys.argv[2]))"
)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def log(folder):
    return (folder / "log.txt").read_text()


def run_killed(folder, hook, at, monkeypatch):
    monkeypatch.setenv("KILL_AT", str(at))
    train = json.dumps({"hooks": [{"_target_": f"tiny_run.{hook.__name__}"}]})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), train], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.delenv("KILL_AT")


@pytest.mark.parametrize("hook, at, resumed_at", [(KillAt, 14, 12), (KillInSave, 11, 6)])
def test_a_killed_run_continues_bit_for_bit(tmp_path, monkeypatch, hook, at, resumed_at):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    do_pretrain(make_config(whole))
    run_killed(killed, hook, at, monkeypatch)
    assert not (killed / "model_final.pth").exists()
    progress = read_progress(str(killed / "progress.json"))
    assert 1 <= progress.done <= at and progress.total == 20 and progress.seconds_left > 0
    assert len(metrics(killed)) == (14 if hook is KillAt else 11)
    cfg = make_config(killed, hooks=[L(hook)()])
    do_pretrain(cfg, resume=True)
    assert f"Starting training from iteration {resumed_at}" in log(killed)

    assert metrics(killed) == metrics(whole)  # every loss of every iteration, each once
    assert [line["iteration"] for line in metrics(killed)] == list(range(20))
    assert equal(final_checkpoint(whole), final_checkpoint(killed))
    assert not list(killed.glob("*.part*"))
    progress = read_progress(str(killed / "progress.json"))
    assert (progress.done, progress.total, progress.seconds_left) == (20, 20, 0.0)


def test_another_seed_is_another_run(tmp_path):
    a = do_pretrain(make_config(tmp_path / "a", max_iter=2))
    b = do_pretrain(make_config(tmp_path / "b", max_iter=2, seed=1))
    again = do_pretrain(make_config(tmp_path / "c", max_iter=2))
    assert a["total_loss"] == again["total_loss"] != b["total_loss"]


def test_learning_rate_and_length_are_scaled_and_logged(tmp_path):
    last = do_pretrain(make_config(tmp_path))
    assert "lr 2 * 8 / 16 = 1, 4 epochs * 5 = 20 iterations of 8 images" in log(tmp_path)
    lines = metrics(tmp_path)
    assert len(lines) == 20
    assert lines[0]["lr"] == pytest.approx(0.01)  # warm-up starts at 1 %
    assert lines[5]["lr"] == pytest.approx(1.0)  # an epoch later
    assert last["total_loss"] == lines[-1]["total_loss"]


def test_unscaled_learning_rate_and_max_iter(tmp_path):
    do_pretrain(make_config(tmp_path, base_batch_size=None, max_iter=10))
    assert "lr 2, 10 iterations of 8 images = 2 epochs" in log(tmp_path)
    # the schedule keeps its shape: warm-up is a quarter of it
    warm = 2 * (0.01 + 0.99 * 0.2 / 0.25)
    cosine = 2 * (1 + math.cos(math.pi * (0.3 - 0.25) / 0.75)) / 2
    lrs = [line["lr"] for line in metrics(tmp_path)]
    assert lrs[2:4] == pytest.approx([warm, cosine], rel=1e-6)


def test_the_output_folder_contains_what_is_documented(tmp_path):
    do_pretrain(make_config(tmp_path))
    names = sorted(os.listdir(tmp_path))
    assert [n for n in names if not n.startswith("events.")] == [
        ".lease",
        "config.yaml",
        "environment.json",
        "last_checkpoint",
        "log.txt",
        "metrics.json",
        "model_0000017.pth",
        "model_final.pth",
        "progress.json",
    ]
    progress = read_progress(str(tmp_path / "progress.json"))
    assert (progress.done, progress.total, progress.seconds_left) == (20, 20, 0.0)
    assert 0 <= time.time() - progress.updated < 60
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    machine = read_machine(str(tmp_path))
    assert machine.endswith(f", PyTorch {torch.__version__.partition('+')[0]}")
    assert f", {torch.backends.cpu.get_cpu_capability()}, " in machine


@pytest.mark.parametrize("device", ["cuda", None])
def test_the_machine_of_a_run_is_that_of_the_device_that_it_uses(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    do_pretrain(make_config(tmp_path, device=device, max_iter=1))
    path, cpu = tmp_path / "environment.json", torch.backends.cpu.get_cpu_capability()
    facts = json.loads(path.read_text())
    assert facts["device"] == "cpu" and f", {cpu}, PyTorch " in read_machine(str(tmp_path))
    path.write_text(json.dumps({**facts, "device": "cuda", "gpu": "H200"}))
    assert read_machine(str(tmp_path)).startswith("H200, PyTorch ")


def test_resuming_a_finished_run_returns_its_metrics(tmp_path):
    last = do_pretrain(make_config(tmp_path))
    before = (tmp_path / "metrics.json").read_text()
    again = do_pretrain(make_config(tmp_path), resume=True)
    assert again["total_loss"] == last["total_loss"]
    assert (tmp_path / "metrics.json").read_text() == before
    assert "is finished: 20 iterations" in log(tmp_path)


def test_nan_stops_the_run_before_it_is_saved(tmp_path):
    cfg = make_config(tmp_path, hooks=[L(Poison)(iteration=9)], log_period=100)
    with pytest.raises(FloatingPointError) as error:
        do_pretrain(cfg)
    assert "iteration 9: loss_main=nan, loss_l2=nan" in str(error.value)
    assert f"last good checkpoint: {tmp_path}/model_0000005.pth" in str(error.value)
    assert not (tmp_path / "model_0000011.pth").exists()
    state = torch.load(tmp_path / "model_0000005.pth", weights_only=True)
    assert all(t.isfinite().all() for t in state["pretraining"].values())


def test_initial_weights_reach_the_model_and_its_hook_is_called(tmp_path, monkeypatch):
    import tiny_run

    told = []
    monkeypatch.setattr(
        tiny_run.TinyMethod,
        "on_weights_loaded",
        lambda model: told.append(
            [net[0].weight.clone() for net in (model.backbone, model.target["net"])]
        ),
    )
    weights = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    state = {f"backbone.{k}": v for k, v in weights.state_dict().items()}
    torch.save({"model": state}, tmp_path / "start.pth")
    cfg = make_config(tmp_path / "run", max_iter=1, init_checkpoint=str(tmp_path / "start.pth"))
    do_pretrain(cfg)
    assert len(told) == 1
    for network, loaded in zip(("online", "target"), told[0], strict=True):
        assert torch.equal(loaded, weights[0].weight), network


def test_adam_settings_survive_weights_only(tmp_path):
    cfg = make_config(tmp_path, max_iter=2)
    cfg.optimizer._target_ = "torch.optim.AdamW"
    cfg.optimizer.betas = [0.9, 0.95]
    do_pretrain(cfg)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert tuple(state["optimizer"]["param_groups"][0]["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize(
    "train, message",
    [
        ({"epochs": None, "max_iter": None}, "train.epochs or train.max_iter"),
        ({"accumulate_steps": 9}, "accumulate_steps=9"),
        ({"device": "tpu"}, "train.device=tpu"),
        ({"amp": {"enabled": True, "dtype": "int8"}}, "amp.dtype=int8"),
        ({"max_iter": 0}, "nothing to train"),
    ],
)
def test_invalid_settings_are_refused_at_once(tmp_path, train, message):
    with pytest.raises(UserError, match=message):
        do_pretrain(make_config(tmp_path, **train))
    assert not list(tmp_path.glob("*.pth"))


def test_a_data_set_smaller_than_a_batch_is_named(tmp_path):
    cfg = make_config(tmp_path)
    cfg.dataloader.train.num_images = 7
    with pytest.raises(UserError, match="smaller than dataloader.train.total_batch_size"):
        do_pretrain(cfg)


def test_a_loader_that_is_not_training_data_is_named(tmp_path):
    cfg = make_config(tmp_path)
    cfg.dataloader.train = {"_target_": "builtins.dict"}
    with pytest.raises(UserError, match="dataloader.train builds a dict, which lacks"):
        do_pretrain(cfg)


ONE_IMAGE = (
    "each process trains on one image at a time (dataloader.train.total_batch_size={}, 1 "
    "processes, train.accumulate_steps={}), too few for batch norm: raise the batch size, lower "
    "accumulate_steps, or use SyncBN with several processes"
)


@pytest.mark.parametrize("size, parts", [(1, 1), (2, 2)])
def test_batch_norm_over_single_images_is_refused_in_one_line(tmp_path, size, parts):
    cfg = make_config(tmp_path, accumulate_steps=parts)
    cfg.model.norm = "BN"
    cfg.dataloader.train.total_batch_size = size
    with pytest.raises(UserError) as error:
        do_pretrain(cfg)
    assert str(error.value) == ONE_IMAGE.format(size, parts)
    assert "Traceback" not in log(tmp_path)


def test_single_images_train_without_batch_norm_or_with_syncbn_in_two_processes(tmp_path):
    cfg = make_config(tmp_path / "none", max_iter=2)
    cfg.dataloader.train.total_batch_size = 1
    do_pretrain(cfg)
    model = {"norm": "SyncBN"}
    launch(
        train_in_process,
        2,
        device="cpu",
        args=(str(tmp_path / "sync"), False, {"max_iter": 2}, model, {"total_batch_size": 2}),
    )
    for name in ("none", "sync"):
        assert len(metrics(tmp_path / name)) == 2
        assert "one image at a time" not in log(tmp_path / name)


class VectorNormMethod(TinyMethod):
    """Normalises vectors as the projectors of the methods do."""

    def __init__(self, norm):
        super().__init__()
        self.predictor = nn.Sequential(self.predictor, VectorNorm(norm, 5))


@pytest.mark.parametrize(
    "norm, size, warned", [("BN", 1, True), ("BN", 2, False), ("LN", 1, False)]
)
def test_a_head_whose_batch_norm_may_never_see_two_vectors_is_named(tmp_path, norm, size, warned):
    cfg = make_config(tmp_path, max_iter=1)
    cfg.model = L(VectorNormMethod)(norm=norm)
    cfg.dataloader.train.total_batch_size = size
    do_pretrain(cfg)
    assert (ONE_IMAGE.format(size, 1) + ": a batch norm that receives" in log(tmp_path)) == warned


def refuse_loader(pin_memory):
    raise UserError(f"pinned: {pin_memory}")


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_of_a_cpu_run_are_not_pinned_on_a_machine_with_gpus(tmp_path, device, pinned):
    cfg = make_config(tmp_path, device=device)
    cfg.dataloader.train = L(refuse_loader)(pin_memory=True)
    with pytest.raises(UserError, match=f"pinned: {pinned}"):
        do_pretrain(cfg)


@pytest.mark.parametrize("hook", [{"period": 3}, {"_target_": "builtins.dict"}, "knn"])
def test_a_hook_that_is_none_is_named(tmp_path, hook):
    cfg = make_config(tmp_path, hooks=[{"_target_": "detectron2.engine.HookBase"}, hook])
    with pytest.raises(UserError, match=r"^train.hooks.1=.* is not a hook: write L\(MyHook\)\("):
        do_pretrain(cfg)
