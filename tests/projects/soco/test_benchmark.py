"""The benchmark's floor of a step does exactly the networks' work."""

import json
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from forked import run_tool
from torch.utils.flop_counter import FlopCounterMode

from region_pretrain.benchmark.step import benchmark_step, make_floor, recorded_calls
from region_pretrain.engine.trainer import Trainer
from region_pretrain.solver import LARS, pretrain_param_groups

ROOT = Path(__file__).parents[3]


def make_trainer(model, **options):
    groups = pretrain_param_groups(model, weight_decay=1e-5)
    return Trainer(model, LARS(groups, lr=0.01), lambda start, stop: (), **options)


def run_step(model, batch):
    with EventStorage(0):
        model.before_step(0, 10)
        losses = model(batch)
        sum(v for k, v in losses.items() if k.startswith("loss")).backward()


def test_calls_are_those_of_the_outermost_networks(small_soco, make_batch):
    model, batch = small_soco(), make_batch(2, (64, 64, 32))
    with recorded_calls(model) as calls:
        run_step(model, batch)
    # 8 + 4 + 4 regions of 2 images; P5 of a 32-pixel view is 1 pixel: sides are divisible
    backbone = ["backbone.bottom_up"]  # and the FPN's convolutions, coarsest first
    backbone += [f"backbone.fpn_{kind}{i}" for i in (5, 4, 3, 2) for kind in ("lateral", "output")]
    names = [c.name for c in calls]
    online = [*backbone, "roi_heads.box_head", "projector", "predictor"]
    target = [f"target.{n}" for n in (*backbone, "head", "projector")]
    assert names == online * 3 + target * 3
    first = {c.name: tuple(c.inputs[0][0]) for c in reversed(calls)}
    assert first["backbone.bottom_up"] == (2, 3, 64, 64)
    assert first["roi_heads.box_head"] == (16, 48, 7, 7)
    assert [c.grad for c in calls] == [True] * 3 * len(online) + [False] * 3 * len(target)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("sizes", [(64, 64, 32), (96, 96, 48)])
def test_floor_has_the_arithmetic_of_the_step(small_soco, make_batch, sizes):
    model, batch = small_soco(), make_batch(2, sizes)
    with recorded_calls(model) as calls, FlopCounterMode(display=False) as step:
        run_step(model, batch)
    model.zero_grad()
    floor = make_floor(calls, torch.enable_grad, torch.device("cpu"))
    with FlopCounterMode(display=False) as alone:
        floor()
    # The step adds the products of matched pairs; region alignment is not counted.
    assert 0.995 < alone.get_total_flops() / step.get_total_flops() <= 1
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("target."), name


def test_figures_of_a_step(small_soco, make_batch, monkeypatch):
    now = 0.0  # stands still but for what these spend
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def spend(seconds):
        def hook(*args):
            nonlocal now
            now += seconds

        return hook

    model = small_soco()
    trainer = make_trainer(model)
    hooks = [
        model.backbone.bottom_up.stem.register_forward_pre_hook(spend(1)),
        model.target.backbone.bottom_up.stem.register_forward_pre_hook(spend(2)),
        model.predictor[-1].weight.register_hook(spend(4)),
        trainer.optimizer.register_step_pre_hook(spend(8)),
    ]
    rates = benchmark_step(trainer, make_batch(2, (64, 64, 32)), seconds=100)
    assert rates.images == 2 and rates.memory_mib > 100
    assert {name: seconds for name, seconds in rates.parts.items() if seconds} == {
        "forward backbone": 3,  # three views
        "forward target.backbone": 6,
        "backward": 4,
        "optimiser": 8,
    }
    assert {"hooks around the step (target update)", "other (transfer)"} <= set(rates.parts)
    assert (rates.step, rates.floor) == (21, 13)
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.module.modules())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--synthetic-images", "4", "--synthetic-size", "500"], "500 is not WIDTHxHEIGHT"),
        (["--synthetic-size", "500x375"], "--synthetic-size requires --synthetic-images"),
        (["--gpus", "8"], "--gpus has no effect with --config-file"),
    ],
)
def test_bad_sizes_are_reported_at_once(more, message):
    done = run_tool("benchmark.py", "--config-file", "none.py", *more)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_command_line(tmp_path):
    out = tmp_path / "figures.json"
    command = [
        *("benchmark.py", "--synthetic-images", "4"),
        *("--seconds", "0.1", "--json", str(out)),
        *("--config-file", str(ROOT / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py")),
        *("train.device=cpu", "dataloader.train.total_batch_size=4"),
    ]
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["step"]["images"] == 4 and figures["loader"]["decode"] > 0
    assert "networks alone" in done.stdout and "loader, antialiased filter" in done.stdout
    done = run_tool(*command, "dataloader.train.total_batch_size=8")
    assert done.returncode == 2 and "raise --synthetic-images" in done.stderr
