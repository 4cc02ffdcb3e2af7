"""The report of a GPU, without one: what only a GPU can measure is None."""

from dataclasses import replace
from pathlib import Path

import torch
from forked import run_tool

from region_pretrain.benchmark import gpu_report
from region_pretrain.benchmark.gpu_report import (
    GpuUse,
    costliest,
    describe_use,
    measure_use,
)
from region_pretrain.benchmark.images import make_jpegs
from region_pretrain.benchmark.plan import Plan, plan_step
from region_pretrain.commands.benchmark import REPORT
from region_pretrain.config import load_config, load_file
from region_pretrain.reporting.summary import union_length

ROOT = Path(__file__).parents[2]
SETTINGS = ["dataloader.train.total_batch_size=8", "dataloader.train.num_workers=0"]


def test_measurements_on_the_cpu(tmp_path):
    path = str(ROOT / "projects/MoCo/configs/moco-v2_r18_b32_shapes.py")
    images = make_jpegs(str(tmp_path), 8, (128, 96))
    cfg = load_config(path, SETTINGS)
    use = measure_use(cfg, "moco", 2, images, torch.device("cpu"), 2**40, seconds=0.1)
    assert (use.recipe_images, use.images, use.precision) == (4, 4, "float32")
    assert use.resident > 0 and use.loaded > 0 and 0 < use.data_wait < 1
    plan = plan_step(load_config(path, ["dataloader.train.total_batch_size=4"]), 1, images)
    assert use.planned_gib * 2**30 == plan.peak
    assert [use.busy, use.peak_gib, use.waits, use.kernels] == [None] * 4
    assert "| moco     |                 4 |" in describe_use([use], "a CPU")


def test_the_batch_is_halved_until_its_plan_fits(monkeypatch):
    planned = []

    def plan(cfg, gpus, images):
        planned.append(cfg.dataloader.train.total_batch_size)
        dtype, cfg.train.amp.dtype = cfg.train.amp.dtype, "bfloat16"  # as plan_step does
        return Plan(planned[-1], gpus, dtype, *[0] * 13, peak=100 * planned[-1])

    monkeypatch.setattr(gpu_report, "plan_step", plan)
    cfg = load_config(str(ROOT / "projects/MoCo/configs/moco-v2_r18_b32_shapes.py"), [])
    cfg.train.amp.dtype = "float16"
    fitting = gpu_report._fitting_plan(cfg, 32, ("", ""), 1200)
    assert (fitting.images, fitting.precision) == (8, "float16")  # 10 fit into 90 %
    assert planned == [32, 8] and cfg.dataloader.train.total_batch_size == 32
    assert gpu_report._fitting_plan(cfg, 32, ("", ""), 50).images == 1


def test_a_report_names_kernels_and_waits():
    kernels = [("gemm|x", 12.0, 3.0), ("k" * 200, 1.5, 60.0)]
    use = GpuUse("soco", 128, 128, "bfloat16", 900.0, 1000.0, 0.1, 0.85, 16.0, 15.5, {}, kernels)
    waiting = replace(use, config="ccop", waits={"loss.py:12": 3, "heads.py:4": 1})
    text = describe_use([use, waiting], "One H100")
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    expected = ["128", "900.0", "1,000.0", "10 %", "85 %", "15.50", "16.00"]
    assert ["soco", *expected, "0"] in cells and ["ccop", *expected, "4"] in cells
    assert ["`gemm/x`", "12.00", "3"] in cells
    assert ["`" + "k" * 97 + "...`", "1.50", "60"] in cells
    assert "One H100" in text and "Waits at loss.py:12 (3), heads.py:4 (1)." in text


def test_overlapping_kernels_are_busy_once():
    assert union_length([(5, 7), (0, 2), (1, 4), (2, 3)]) == 6
    assert union_length([]) == 0


def test_costliest_kernels_are_per_step():
    events = [("a", 0.0, 1000.0), ("b", 0.0, 5000.0), ("a", 2000.0, 4000.0)]
    events += [(f"other{i}", 0.0, 1.0) for i in range(20)]
    found = costliest(events, steps=2)
    assert found[:2] == [("b", 2.5, 0.5), ("a", 1.5, 1.0)] and len(found) == 10


def test_a_machine_without_gpu_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_tool("benchmark.py", "--gpu-report", tmp_path)
    message = "error: --gpu-report: PyTorch finds no GPU on this machine (try nvidia-smi)"
    assert (done.returncode, done.stderr.splitlines()) == (2, [message])
    assert not list(tmp_path.iterdir())


def test_the_report_has_one_recipe_per_method():
    configs = load_file(REPORT).report.configs
    assert all((ROOT / path).is_file() for path in configs)
    methods = [path.parent.name for path in ROOT.glob("projects/*/configs")]
    assert sorted(Path(path).parts[1] for path in configs) == sorted(methods)
