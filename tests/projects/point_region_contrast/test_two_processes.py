"""Two gloo processes against one with the same global batch."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.modeling.norms import use_cpu_sync_batchnorm
from region_pretrain.projects.point_region_contrast import PointContrast

# shuffle, other images' points, FPN level
CASES = {
    "gathered": (False, "gathered", ""),
    "queue": (False, "queue", "p3"),
    # Images dealt to the other process: with statistics that are fixed nothing else changes.
    "shuffled": (True, "gathered", ""),
}


def _step(model, batch, module):
    with EventStorage():
        module.before_step(6, 10)
    outputs = model(batch)
    sum(value for name, value in outputs.items() if name.startswith("loss")).backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    means = {n: v.detach() for n, v in outputs.items() if n.startswith("loss")}
    state = {n: v.clone() for n, v in module.state_dict().items() if "queue" in n or "centre" in n}
    return means, gradients, state


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in CASES:
        model, batch = torch.load(f"{folder}/{name}.pt", weights_only=False)
        model = use_cpu_sync_batchnorm(model)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        means, gradients, state = _step(wrapped, batch.chunk(2)[rank], model)
        for value in means.values():
            dist.all_reduce(value)
        found[name] = ({n: v / 2 for n, v in means.items()}, gradients, state)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_and_two(small_model, make_batch, tmp_path_factory):
    """For each case what one process found, and what each of two did."""
    folder = tmp_path_factory.mktemp("processes")
    one = {}
    for name, (shuffle, others, fpn) in CASES.items():
        contrast = PointContrast(others=others, queue_length=150, dim=16)
        model = small_model(shuffle=shuffle, fpn=fpn, prototypes=4, contrast=contrast)
        if shuffle:
            for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
                norm.eval()
                norm.running_var.fill_(2.0)
        batch = make_batch(6)
        batch.views[2].valid[:2] = False  # processes with different numbers of points and places
        for view in batch.views[:2]:
            view.valid[0, :24] = False
        torch.save((model, batch), folder / f"{name}.pt")
        one[name] = _step(model, batch, model)
    spawn(_rank, (str(folder),), nprocs=2)
    two = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: (one[name], [found[name] for found in two]) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(one_and_two, case):
    (means, gradients, state), two = one_and_two[case]
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    for other_means, other_gradients, other_state in two:
        assert other_means.keys() == means.keys() and other_gradients.keys() == gradients.keys()
        for name, value in means.items():
            torch.testing.assert_close(other_means[name], value, rtol=1e-4, atol=2e-5)
        for name, value in gradients.items():
            difference = (other_gradients[name] - value).norm()
            assert difference <= 5e-3 * value.norm() + 1e-4 * norm, name
        for name, value in state.items():  # keys in the same places
            torch.testing.assert_close(other_state[name], value, rtol=1e-3, atol=1e-3)
    assert len(means) == 3 and state["queue.pointer"] == 6
    if case == "queue":
        assert 0 < state["contrast.queue.pointer"] < 150
