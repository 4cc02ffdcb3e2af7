"""The simulated device finds the faults that it is there for."""

import json

import pytest

WAITS = {
    "item": "_local_scalar_dense",
    "bool": "_local_scalar_dense",
    "int": "_local_scalar_dense",
    "tolist": "tolist",
    "cpu": "copy to the CPU",
    "nonzero": "nonzero",
    "mask index": "index by a mask",
    "mask assignment": "index by a mask",
    "index on the CPU": "index on the CPU",
    "blocking copy": "blocking copy to the device",
    "pageable copy": "copy of 131072 pageable bytes to the device",
}
ERRORS = {
    "tensor on the CPU": r"tensors on gpu:0, and of shape (4,) on the CPU",
    "collective on the CPU": "no backend of the group accepts tensors of the CPU",
    "device in the side group": "a tensor of the device in a group of the CPU",
}


@pytest.fixture(scope="module")
def planted(run_scripts, tmp_path_factory):
    out = tmp_path_factory.mktemp("planted") / "found.json"
    run_scripts([["planted.py", str(out)]])
    return json.loads(out.read_text())


def test_a_model_without_a_fault_is_clean(planted):
    clean = planted["none"]
    assert clean["waits"] == clean["half"] == {} and clean["without_gradient"] == []
    assert clean["kernels"]["addmm"] == 1


@pytest.mark.parametrize("fault", WAITS)
def test_a_wait_is_found_with_its_line(planted, fault):
    [(where, times)] = planted[fault]["waits"].items()
    assert where.startswith(f"{WAITS[fault]} at planted.py:") and times == 1


@pytest.mark.parametrize("fault", ERRORS)
def test_tensors_of_the_wrong_device_raise(planted, fault):
    assert ERRORS[fault] in planted[fault]["error"]


def test_a_parameter_without_gradient_is_named(planted):
    assert planted["unused parameter"]["without_gradient"] == ["unused"]


def test_half_precision_is_found_where_it_matters(planted):
    [choice] = planted["choice in half precision"]["half"]
    [comparison] = planted["comparison in half precision"]["half"]
    assert choice.startswith("argmax at planted") and comparison.startswith("gt at planted")
    # The second is that of the gradients.
    calls = ["all_reduce (2, 4) torch.bfloat16", "all_reduce (52,) torch.float32"]
    assert planted["half-precision collective"]["collectives"] == calls


def test_every_planted_fault_is_checked(planted):
    others = {"none", "unused parameter", "half-precision collective"}
    others |= {"choice in half precision", "comparison in half precision"}
    assert planted.keys() == WAITS.keys() | ERRORS.keys() | others
