"""Batch norm over several processes against one process with the complete batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.layers import Conv2d, get_norm
from detectron2.solver.build import get_default_optimizer_params
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from region_pretrain.engine.processes import leave_process_group
from region_pretrain.modeling.norms import (
    GhostBatchNorm,
    SyncBatchNorm,
    use_local_batchnorm,
    use_sync_batchnorm,
)

CHANNELS = 5


def make_norm(affine: bool, momentum: float | None) -> nn.SyncBatchNorm:
    torch.manual_seed(3)
    norm = nn.SyncBatchNorm(CHANNELS, affine=affine, momentum=momentum)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def run(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor, steps: int) -> dict:
    """Several forward passes in training mode on the same input, then one backward pass."""
    x = x.clone().requires_grad_()
    for _ in range(steps):
        output = norm(x)
    (output * weight).sum().backward()
    gradients = {k: p.grad for k, p in norm.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **gradients, **dict(norm.named_buffers())}


def worker(rank: int, folder: str, cases: list) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    results = []
    for shards, weights, affine, momentum in cases:
        norm = use_sync_batchnorm(nn.Sequential(make_norm(affine, momentum)))[0]
        results.append(run(norm, shards[rank], weights[rank], steps=3))
    refused = None
    try:
        make_norm(True, 0.1)(cases[0][0][rank])
    except ValueError as error:
        refused = str(error)
    # Half precision: rank 1 has no sample. Then no rank has two.
    norm = use_sync_batchnorm(make_norm(True, 0.1))
    sent = []
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda out, x: (sent.append((x.dtype, len(x))), gather(out, x))
    half = run(norm, cases[0][0][rank][: 6 * (1 - rank)].bfloat16(), torch.ones(1), steps=1)
    before = {k: v.clone() for k, v in norm.named_buffers()}
    few = [run(norm, torch.ones(n if rank == 0 else 0, CHANNELS), torch.ones(1), 1) for n in (0, 1)]
    torch.save((results, refused, (half, sent, before, few)), f"{folder}/{rank}.pt")
    leave_process_group()


def make_case(first: tuple, second: tuple, affine=True, momentum=0.1, mean=0.0):
    generator = torch.Generator().manual_seed(len(first) * 100 + first[0])
    shards = [torch.randn(s, generator=generator) * 2 + mean for s in (first, second)]
    weights = [torch.randn(s, generator=generator) for s in (first, second)]
    return shards, weights, affine, momentum


CASES = {
    "vectors": make_case((6, CHANNELS), (6, CHANNELS)),
    "maps": make_case((2, CHANNELS, 4, 3), (2, CHANNELS, 4, 3)),
    "unequal numbers of regions": make_case((7, CHANNELS), (2, CHANNELS)),
    "unequal maps": make_case((2, CHANNELS, 6, 5), (1, CHANNELS, 3, 4)),
    "no region on one process": make_case((4, CHANNELS), (0, CHANNELS)),
    "no affine": make_case((6, CHANNELS), (5, CHANNELS), affine=False),
    "cumulative average": make_case((6, CHANNELS), (5, CHANNELS), momentum=None),
    "far from zero": make_case((6, CHANNELS, 2, 2), (5, CHANNELS, 2, 2), mean=300.0),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder), list(CASES.values())), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def as_samples(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) to (N', C): batch norm does not depend on the arrangement of samples."""
    return x.movedim(1, -1).reshape(-1, CHANNELS)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_the_whole_batch(two_processes, name):
    shards, weights, affine, momentum = CASES[name]
    ranks = [results[list(CASES).index(name)] for results, _, _ in two_processes]
    plain = nn.BatchNorm1d(CHANNELS, affine=affine, momentum=momentum)
    plain.load_state_dict(make_norm(affine, momentum).state_dict())
    whole, weight = (torch.cat([as_samples(s) for s in both]) for both in (shards, weights))
    expected = run(plain, whole, weight, steps=3)

    tolerance = dict(rtol=1e-5, atol=1e-5 if name != "far from zero" else 2e-4)
    for key in ("output", "x"):
        got = torch.cat([as_samples(rank[key]) for rank in ranks])
        torch.testing.assert_close(got, expected[key], **tolerance)
    for key in ("weight", "bias") if affine else ():
        torch.testing.assert_close(sum(rank[key] for rank in ranks), expected[key], **tolerance)
    for rank in ranks:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(rank[key], expected[key], rtol=1e-4, atol=1e-5)


def test_pytorch_itself_raises(two_processes):
    """If this fails, PyTorch supports SyncBN on CPUs: ``CpuKernels`` may no longer be needed."""
    assert all("expected input tensor to be on GPU" in refused for _, refused, _ in two_processes)


def test_every_process_sends_float32_even_without_samples(two_processes):
    for (half, sent, _, _), size in zip((x for _, _, x in two_processes), (6, 0), strict=True):
        assert sent == [(torch.float32, 2 * CHANNELS + 1)] * 3
        assert half["output"].dtype == half["x"].dtype == torch.bfloat16
        assert half["output"].shape == half["x"].shape == (size, CHANNELS)
        assert half["weight"].dtype == torch.float32  # also a gradient of 0, for DDP
        assert half["num_batches_tracked"] == 1
    assert not two_processes[1][2][0]["weight"].any()


def test_torch_compile_needs_no_break():
    """As in a group of two processes, one of which is this one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = use_sync_batchnorm(make_model()["conv"]).train()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()
        assert model.norm.num_batches_tracked == 1 and model.norm.weight.grad is not None
    finally:
        dist.destroy_process_group()


def test_fewer_than_two_samples_leave_the_running_statistics_unchanged(two_processes):
    for rank, (_, _, (_, _, before, few)) in enumerate(two_processes):
        for result in few:
            assert all(torch.equal(result[name], before[name]) for name in before)
            assert all(value.isfinite().all() for value in result.values())
        expected = make_norm(True, 0.1).bias.detach()[None]  # a single value is its own mean
        assert torch.equal(few[1]["output"], expected if rank == 0 else expected[:0])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    shared = get_norm("SyncBN", 4)
    return nn.ModuleDict(
        {
            "conv": Conv2d(3, 4, 3, bias=False, norm=get_norm("SyncBN", 4)),
            "first": nn.Sequential(shared, nn.ReLU()),
            "second": nn.Sequential(shared, nn.BatchNorm1d(4), nn.SyncBatchNorm(4, affine=False)),
        }
    )


def test_conversion_changes_only_the_class():
    model = make_model()
    model["conv"].norm.eval()
    before = {k: v for k, v in model.state_dict(keep_vars=True).items()}
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert use_sync_batchnorm(model) is model

    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[k] is before[k] for k in before)  # the very same tensors
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == order
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == 3
    assert model["first"][0] is model["second"][0]
    assert (model["conv"].norm.training, model["first"][0].training) == (False, True)
    assert type(model["second"][1]) is nn.BatchNorm1d
    use_sync_batchnorm(model)  # a second time changes nothing
    assert all(v is before[k] for k, v in model.state_dict(keep_vars=True).items())


def test_a_model_that_is_itself_a_norm():
    norm = nn.SyncBatchNorm(4)
    new = use_sync_batchnorm(norm)
    assert new is norm and type(norm) is SyncBatchNorm


def test_one_process_without_group_equals_batch_norm():
    model = make_model()
    converted = use_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(2, 3, 6, 6)
    for training in (True, False):
        for m in (model, converted):
            m.train(training)
        assert torch.equal(model["conv"](x), converted["conv"](x))
        vectors = torch.randn(7, 4)
        assert torch.equal(model["second"](vectors), converted["second"](vectors))
    with pytest.raises(ValueError, match="got shape"):
        converted["first"](torch.randn(4))


def test_weight_decay_and_precise_bn_see_a_norm():
    model = use_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)))
    groups = get_default_optimizer_params(model, weight_decay=0.1, weight_decay_norm=0.0)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert (decay[id(model[0].weight)], decay[id(model[1].weight)]) == (0.1, 0.0)
    assert get_bn_modules(model) == [model[1]]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("samples", "parts"), [(8, [4, 4]), (10, [4, 3, 3]), (4, [4]), (3, [3])])
def test_groups_are_normalised_as_by_norms_of_their_own(samples, parts, affine, momentum):
    torch.manual_seed(1)
    x, weight = torch.randn(2, samples, CHANNELS, 3, 2) * 2 + 1
    ghost = use_local_batchnorm(make_norm(affine, momentum), 4)
    assert type(ghost) is GhostBatchNorm
    found = run(ghost, x, weight, steps=1)
    each = []
    for part, its_weight in zip(x.split(parts), weight.split(parts), strict=True):
        plain = nn.BatchNorm2d(CHANNELS, affine=affine, momentum=momentum)
        plain.load_state_dict(make_norm(affine, momentum).state_dict())
        each.append(run(plain, part, its_weight, steps=1))
    for key in ("output", "x"):
        torch.testing.assert_close(found[key], torch.cat([own[key] for own in each]))
    for key in ("weight", "bias") if affine else ():
        torch.testing.assert_close(found[key], sum(own[key] for own in each))
    assert found["num_batches_tracked"] == 1
    for key in ("running_mean", "running_var"):
        expected = torch.stack([own[key] for own in each]).mean(0)
        torch.testing.assert_close(found[key], expected)
    ghost.eval()
    expected = torch.nn.functional.batch_norm(
        x, found["running_mean"], found["running_var"], ghost.weight, ghost.bias
    )
    torch.testing.assert_close(ghost(x), expected)
