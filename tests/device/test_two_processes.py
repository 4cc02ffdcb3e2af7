"""Two processes on simulated GPUs, under NCCL's rules."""

import json

import pytest


@pytest.fixture(scope="module")
def ranks(run_scripts, configs, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    common = ["steps.py", str(folder), images, *configs, "--world", "2", "--rank"]
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
