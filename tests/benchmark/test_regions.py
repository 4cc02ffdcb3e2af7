"""Recipes compared on the same objects."""

import time

import pytest
from forked import run_tool

from region_pretrain.benchmark.regions import compare_recipes
from region_pretrain.data.catalog import get_records
from region_pretrain.data.shapes import shapes
from region_pretrain.errors import UserError
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.recipes import get_recipe


def test_results_are_those_of_the_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.thread_time)  # without that of others
    records = get_records(shapes(split="val", size=4, side=96, level="easy"))
    names = ["ground_truth-v1", "grid-v1", "shapes-v1"]
    costs = compare_recipes(records, [get_recipe(name) for name in names])
    assert [cost.recipe for cost in costs] == names
    assert costs[0].recall == {0.5: 100.0, 0.7: 100.0}
    assert costs[0].boxes == sum(len(r["annotations"]) for r in records) / 4
    assert 0 < costs[0].seconds < costs[2].seconds  # reading a list, and selective search
    for name, cost in zip(names, costs, strict=True):
        summary = make_regions(records, str(tmp_path / f"{name}.arrow"), name, workers=1)
        assert cost.boxes == pytest.approx(summary["mean"])
        for iou, value in cost.recall.items():
            assert value == pytest.approx(100 * summary[f"recall@{iou:g}"])
        assert cost.precision == pytest.approx(100 * summary["precision@0.5"])
    assert costs[0].precision == 100
    assert costs[1].precision < costs[2].precision < 100  # grid windows fit few objects


def test_without_objects_there_is_no_recall(region_folder):
    records = get_records(f"folder://{region_folder.images}")
    with pytest.raises(UserError, match="ground truth"):
        compare_recipes([{**r, "annotations": []} for r in records[:1]], [get_recipe("grid-v1")])


def test_command_line():
    arguments = ["--side", 96, "--count", 2, "grid-v1", "shapes-v1"]
    done = run_tool("benchmark_regions.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["grid-v1", "shapes-v1"]
    assert done.stdout.split("\n")[0].endswith("precision@0.5 (%)")
    assert " 1.0x " in done.stdout.splitlines()[2]
