"""Each Shapes recipe trains on a simulated GPU as on the CPU, without waiting for the device."""

import json
from pathlib import Path

import pytest

#: Kernels of a float32 step at batch size 4; a change that needs more should know it.
MOST_KERNELS = {
    "byol_r18_b32_shapes": 900,
    "ccop_r18-fpn_b32_shapes": 900,
    "mcl-supervised_r18-fpn_b32_shapes": 1300,
    "mcl_r18-fpn_b32_shapes": 1900,
    "moco-v2_r18_b32_shapes": 600,
    "point-region_r18-fpn_b32_shapes": 1200,
    "point-region_r18_b32_shapes": 1200,
    "soco_r18-fpn_b32_shapes": 2000,
}


@pytest.fixture(scope="module")
def found(run_scripts, configs, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_scripts([["steps.py", str(folder), images, *configs]])
    return json.loads((folder / "0.json").read_text())


def test_two_steps_on_the_device_are_those_on_the_cpu(found, config):
    """A tensor left on the CPU would raise, so this also shows that no devices are mixed."""
    on_cpu, on_device = found[config]["all"]["cpu"], found[config]["all"]["float32"]["losses"]
    assert len(on_device) == 2 and on_device[0] != on_device[1]
    for a, b in zip(on_cpu, on_device, strict=True):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_waits_for_nothing_and_fills_every_gradient(found, config, precision):
    result = found[config]["all"][precision]
    assert result["waits"] == {}
    assert result["without_gradient"] == []
    assert result["kernels"]["convolution"] >= 40  # the step was recorded


def test_under_autocast_choices_and_losses_are_float32(found, config):
    result = found[config]["all"]["bfloat16"]
    assert result["half"] == {}
    assert result["losses"][0] != found[config]["all"]["cpu"][0]  # the networks were not
    assert result["losses"][0] == pytest.approx(found[config]["all"]["cpu"][0], rel=0.03, abs=0.1)


def test_a_step_launches_no_more_kernels_than_before(found, config):
    kernels = sum(found[config]["all"]["float32"]["kernels"].values())
    assert 500 < kernels <= MOST_KERNELS.get(Path(config).stem, 2000)
