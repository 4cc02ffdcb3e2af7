"""Two gloo processes against one with the same global batch."""

import pytest
from two_processes import check_two_are_one, one_and_two_processes, with_fixed_statistics

from region_pretrain.projects.point_region_contrast import PointContrast

# shuffle or the batch size of the norms, options of the contrast, FPN level
CASES = {
    "gathered": (False, dict(others="gathered"), ""),
    "queue": (False, dict(others="queue", queue_length=150, dim=16), "p3"),
    # Images shuffled over both processes: with fixed statistics the results are the same.
    "shuffled": (True, dict(others="gathered"), ""),
    # Batch norms over three images: both groups of one process, or one of each process.
    "groups": (3, dict(others="gathered"), "p3"),
    # Query points are negatives of the other process's, and receive their gradient.
    "same_view": (False, dict(others="gathered", same_view=True), ""),
}


@pytest.fixture(scope="module")
def one_and_two(small_model, make_batch, tmp_path_factory):
    cases = {}
    for name, (shuffle, options, fpn) in CASES.items():
        contrast = PointContrast(**options)
        size = None if isinstance(shuffle, bool) else shuffle
        options = dict(fpn=fpn, prototypes=4, contrast=contrast, norm_batch_size=size)
        model = small_model(shuffle=bool(shuffle), **options)
        batch = make_batch(6)
        batch.views[2].valid[:2] = False  # processes with different numbers of points and places
        for view in batch.views[:2]:
            view.valid[0, :24] = False
        cases[name] = (with_fixed_statistics(model) if shuffle is True else model, batch)
    folder = tmp_path_factory.mktemp("processes")
    return one_and_two_processes(cases, folder, outputs=["loss"], state=["queue"])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(one_and_two, case):
    one, two = one_and_two[case]
    check_two_are_one(one, two)
    assert len(one.outputs) == 3 and one.state["queue.pointer"] == 6
    if case == "queue":
        assert 0 < one.state["contrast.queue.pointer"] < 150
