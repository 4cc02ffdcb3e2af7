"""Two processes on simulated GPUs, under NCCL's rules."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: One recipe per method: their other ones do not differ in what processes exchange.
CONFIGS = [
    "projects/BYOL/configs/byol_r18_b32_shapes.py",
    "projects/CCOP/configs/ccop_r18-fpn_b32_shapes.py",
    "projects/MCL/configs/mcl_r18-fpn_b32_shapes.py",
    "projects/MoCo/configs/moco-v2_r18_b32_shapes.py",
    "projects/PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py",
    "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py",
]


@pytest.fixture(scope="module")
def ranks(run_scripts, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    common = ["steps.py", str(folder), images, *CONFIGS, "--world", "2", "--rank"]
    run_scripts([[*common, "0"], [*common, "1"]])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_losses_are_those_of_two_processes_on_the_cpu(ranks, config):
    for rank in ranks:
        for part in rank[config].values():
            for a, b in zip(part["cpu"], part["float32"]["losses"], strict=True):
                assert b == pytest.approx(a, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_process_waits_whatever_its_number_of_regions(ranks, config, precision):
    for rank in ranks:
        for part in rank[config].values():
            assert part[precision]["waits"] == {}
            assert part[precision]["half"] == {}
            assert part[precision]["without_gradient"] == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_processes_call_the_same_collectives_in_the_same_order(ranks, config, precision):
    """Also if one has fewer regions than the other, or none; statistics are float32 throughout."""
    for part in ranks[0][config]:
        first, second = (rank[config][part][precision]["collectives"] for rank in ranks)
        assert first == second and any(call.startswith("all_reduce") for call in first)
        assert not any("float16" in call for call in first)  # nor bfloat16


def test_methods_with_regions_are_run_with_unequal_numbers_and_with_none(ranks):
    parts = {config.split("/")[1]: set(ranks[0][config]) for config in ranks[0]}
    assert all(parts[m] == {"unequal", "empty"} for m in ("SoCo", "CCOP", "PointRegionContrast"))
    assert all(parts[method] == {"all"} for method in ("BYOL", "MoCo", "MCL"))


def test_every_method_with_such_a_recipe_is_here():
    found = {path.parts[-3] for path in ROOT.glob("projects/*/configs/*shapes.py")}
    assert {config.split("/")[1] for config in CONFIGS} == found and len(CONFIGS) == len(found)
