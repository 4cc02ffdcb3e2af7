"""Two gloo processes with different numbers of regions against one with the same global batch."""

import pytest
from two_processes import check_two_are_one, one_and_two_processes, with_fixed_statistics

from region_pretrain.projects.ccop import Feedback

# shuffle or the batch size of the norms, regions per image
CASES = {
    "batch norm over both": (False, (1, 2, 6, 4)),
    "one process has no region": (False, (0, 0, 3, 5)),
    # Images shuffled over both processes: with fixed statistics the results are the same.
    "shuffled": (True, (1, 2, 6, 4)),
    # Batch norms over two images: both groups of one process, or one of each process.
    "groups": (2, (1, 2, 6, 4)),
}


@pytest.fixture(scope="module")
def one_and_two(small_ccop, make_batch, tmp_path_factory):
    cases = {}
    for name, (shuffle, counts) in CASES.items():
        size = None if isinstance(shuffle, bool) else shuffle
        model = small_ccop(shuffle=bool(shuffle), norm_batch_size=size, dropout=0.0)
        model.curriculum.feedback = Feedback(period=3)
        model = with_fixed_statistics(model) if shuffle is True else model
        cases[name] = (model, make_batch(counts, seed=4))
    folder = tmp_path_factory.mktemp("processes")
    outputs, state = ["loss", "curriculum"], ["queue", "curriculum.measured"]
    return one_and_two_processes(cases, folder, outputs, state)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(one_and_two, case):
    one, two = one_and_two[case]
    check_two_are_one(one, two)
    regions = sum(CASES[case][1])
    assert one.state["region_queue.pointer"] == regions
    assert one.state["curriculum.measured"][1] == regions
