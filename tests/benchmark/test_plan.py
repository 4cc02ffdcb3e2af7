"""Operators, FLOPs and memory of a step on fake tensors."""

import json
from itertools import repeat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import run_tool
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from region_pretrain.benchmark.images import make_jpegs
from region_pretrain.benchmark.live_memory import LiveMemory, SavedTensors, storage_bytes
from region_pretrain.benchmark.measure import make_trainer, synthetic_batch, use_images
from region_pretrain.benchmark.plan import Plan, _FloatOnCuda, describe_plan, gpus_of, plan_step
from region_pretrain.benchmark.step import repeated_steps
from region_pretrain.config import load_config
from region_pretrain.errors import UserError

ROOT = Path(__file__).parents[2]
#: One recipe per method.
CONFIGS = [
    next(iter(sorted(project.glob("configs/*shapes.py"), reverse=True)))
    for project in sorted(ROOT.glob("projects/*"))
    if list(project.glob("configs/*shapes.py"))
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_jpegs(str(tmp_path_factory.mktemp("images")), 4, (128, 96))


def config(path, total):
    return load_config(str(path), [f"dataloader.train.total_batch_size={total}"])


def measure_saved(path, images):
    """Bytes that autograd saves in a real step on the CPU."""
    cfg = config(path, 4)
    use_images(cfg, *images)
    trainer = make_trainer(cfg, torch.device("cpu"))
    batch = synthetic_batch(cfg, 4)
    with repeated_steps(trainer, lambda start, stop: repeat(batch)) as step:
        saved = SavedTensors([*trainer.module.parameters(), *trainer.module.buffers()])
        with saved:
            step()
    assert saved.bytes == 0  # the backward pass has freed everything
    return saved.peak, trainer


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_planned_memory_is_that_of_a_step_on_the_cpu(path, images):
    plan = plan_step(config(path, 4), 1, images)
    saved, trainer = measure_saved(path, images)
    assert plan.saved == pytest.approx(saved, rel=0.01)
    model = trainer.module
    everything = storage_bytes([*model.parameters(), *model.buffers()])
    assert plan.parameters + plan.momentum + plan.buffers == everything
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.gradients == storage_bytes(trained)
    assert plan.optimizer == storage_bytes(trained)  # one momentum buffer per parameter
    assert plan.momentum > 0.5 * plan.parameters or "supervised" in path.stem
    assert plan.fixed + plan.pixels + plan.saved_at_peak < plan.peak
    assert 500 < plan.operators < 2100 and plan.flops > 1e8


def test_six_methods_are_planned():
    assert len(CONFIGS) == 6


def test_processes_share_the_batch(images):
    path = next(p for p in CONFIGS if "moco" in p.stem)
    one, two = (plan_step(config(path, 8), gpus, images) for gpus in (1, 2))
    assert (one.images, two.images, one.buckets) == (8, 4, 0)
    assert two.buckets == two.gradients == one.gradients
    assert two.flops == pytest.approx(one.flops / 2, rel=0.01)
    assert two.saved == pytest.approx(one.saved / 2, rel=0.1)
    with pytest.raises(UserError, match="total_batch_size=8 is not a multiple of --gpus 3"):
        plan_step(config(path, 8), 3, images)


def test_saved_tensors_are_counted_once_per_storage():
    first, second = nn.Linear(10, 20), nn.Linear(20, 5)
    saved = SavedTensors([*first.parameters(), *second.parameters()])
    with saved:
        y = second(first(torch.zeros(3, 10)).relu())
    # The input, and the result of ReLU, which both ReLU and the second layer save.
    assert saved.bytes == saved.peak == 4 * (3 * 10 + 3 * 20)
    y.sum().backward()
    assert (saved.bytes, saved.peak) == (0, 360)


def test_live_memory_follows_tensors_that_come_and_go():
    x = FakeTensorMode().from_tensor(torch.zeros(100))
    with LiveMemory([x], SavedTensors([])) as live:
        a = x + 1
        b = a[:50]  # a view
        del a
        assert live.bytes == 800
        c = torch.cat([b, x])
        assert live.bytes == 1400
        del b, c
    assert (live.bytes, live.peak, live.largest, live.operators) == (400, 1400, 600, 2)


def test_the_peak_after_the_backward_pass_is_known(images):
    """In the optimiser's step of a small batch: weights, gradients, momentum and two copies."""
    path = next(p for p in CONFIGS if "byol" in p.stem)
    small, large = (plan_step(config(path, total), 1, images) for total in (2, 64))
    assert small.late_peak - small.pixels == large.late_peak - large.pixels
    assert small.peak == small.late_peak and small.saved_at_peak == 0
    assert large.peak > 1.5 * large.late_peak and large.saved_at_peak > 0.9 * large.saved
    twice = plan_step(config(path, 128), 1, images)
    assert large.fitting(twice.peak / 0.9) == pytest.approx(128, rel=0.06)


def test_norms_and_softmax_are_float32_as_under_autocast_on_cuda():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    layer = nn.LayerNorm(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert x.softmax(1).dtype == torch.bfloat16
        with _FloatOnCuda():
            found = [layer(x), x.softmax(1), F.softmax(x, dim=1), F.group_norm(x, 1)]
            assert {y.dtype for y in found} == {torch.float32}
            assert F.linear(x, layer.weight[None]).dtype == torch.bfloat16


def test_names_tell_the_number_of_gpus():
    assert gpus_of("projects/SoCo/configs/soco_r50-fpn_16xb128-100ep_imagenet.py") == 16
    assert gpus_of("projects/SoCo/configs/soco_r18-fpn_b32_shapes.py") == 1


def test_memory_is_linear_in_the_batch():
    gib = 2**30
    sizes = {"parameters": gib, "momentum": gib, "buffers": 0, "optimizer": gib, "buckets": gib}
    plan = Plan(
        **sizes,
        **{"images": 32, "gpus": 8, "precision": "float32", "operators": 1000},
        **{"flops": 32 * 10**12, "gradients": gib, "pixels": gib, "saved": 15 * gib},
        **{"temporary": gib, "saved_at_peak": 14 * gib},
        **{"late_peak": 7 * gib, "peak": 20 * gib},
    )
    assert plan.fitting(40 * gib) == 64  # (0.9 * 40 - 4) / (16 / 32)
    assert plan.fitting(7.7 * gib) == 0 and plan.fitting(7.8 * gib) == 6
    lines = [line.replace(" ", "") for line in describe_plan("name", plan).splitlines()]
    assert "|**peak**|20.00|" in lines and "|gradientsandtemporarytensors|1.00|" in lines
    assert "|40|64|4|" in lines  # 4 GPUs for 256 images
    assert "|GPU-hourspermillionimages,at100TFLOP/s|2.78|" in lines


def test_command_line(tmp_path):
    out = tmp_path / "plan.json"
    options = ["--json", out, "dataloader.train.total_batch_size=2"]
    done = run_tool("benchmark.py", "--plan", CONFIGS[0], *options)
    assert done.returncode == 0, done.stderr
    assert f"## {CONFIGS[0].stem}\n\n2 images per step on 1 GPU, float32." in done.stdout
    found = json.loads(out.read_text())
    assert found["images"] == 2 and found["peak"] > found["saved"] > 0


def test_mistakes_on_the_command_line_are_named():
    detection = "configs/detection/mask_rcnn_r18_fpn_shapes.py"
    for mode in ("--plan", "--config-file"):
        done = run_tool("benchmark.py", mode, detection)
        assert done.stderr.startswith("error: not a pre-training config: it has no dataloader")
    done = run_tool("benchmark.py", "--config-file", CONFIGS[0], "--threads", 0)
    assert done.returncode == 2 and "'0' is not a whole number of at least 1" in done.stderr
