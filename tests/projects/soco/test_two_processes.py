"""Two gloo processes against one with the same global batch: losses and gradients."""

import pytest
from two_processes import check_two_are_one, one_and_two_processes


@pytest.mark.parametrize("all_levels", [False, True])
def test_two_processes_are_one(small_soco, make_batch, tmp_path, all_levels):
    scales = (16, 32, 60, 64)
    model = small_soco(level_scales=scales, all_levels=all_levels, zero_init=False).train()
    cases = {"soco": (model, make_batch(4, (64, 64, 32), seed=4))}
    ((one, two),) = one_and_two_processes(cases, tmp_path, ["loss"], []).values()
    assert one.outputs.keys() == {"loss_view2", "loss_view3"}
    check_two_are_one(one, two)
