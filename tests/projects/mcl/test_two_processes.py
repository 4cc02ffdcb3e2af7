"""Two gloo processes against one with the same global batch and montages."""

import pytest
import torch
from torch import distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.engine.processes import leave_process_group
from region_pretrain.modeling.norms import use_sync_batchnorm


def _losses_and_gradients(model, batch, module, slots):
    drawn = iter(slots)
    module.montage.draw = lambda _: next(drawn)
    outputs = model(batch)
    losses = {k: v for k, v in outputs.items() if k.startswith("loss")}
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, gradients


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case in ("windows", "all"):
        model, batch, slots = torch.load(f"{folder}/{case}.pt", weights_only=False)
        model = use_sync_batchnorm(model)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        losses, gradients = _losses_and_gradients(wrapped, batch.chunk(2)[rank], model, slots[rank])
        for value in losses.values():
            dist.all_reduce(value)
        result = {k: v / 2 for k, v in losses.items()}, gradients
        torch.save(result, f"{folder}/{case}-{rank}.pt")
    leave_process_group()


def test_two_processes_are_one(small_mcl, make_batch, tmp_path):
    cases = {"windows": dict(pairing="top"), "all": dict(pairing="same")}
    batch = make_batch(8, seed=4)
    expected = {}
    for case, arguments in cases.items():
        model = small_mcl(compute=case, temperature=0.2, **arguments).train()
        slots = [[model.montage.draw(4) for _ in range(2)] for _ in range(2)]  # rank, pyramid
        torch.save((model, batch, slots), tmp_path / f"{case}.pt")
        # The single process has the first rank's canvases, followed by the second's.
        joined = [
            [torch.cat([a, b + 4]) for a, b in zip(*pyramids, strict=True)]
            for pyramids in zip(*slots, strict=True)
        ]
        expected[case] = _losses_and_gradients(model, batch, model, joined)
    spawn(_rank, (str(tmp_path),), nprocs=2)
    for case, (losses, gradients) in expected.items():
        for rank in range(2):
            other_losses, other_gradients = torch.load(tmp_path / f"{case}-{rank}.pt")
            for name, value in losses.items():
                assert other_losses[name].item() == pytest.approx(value.item(), abs=2e-5)
            assert other_gradients.keys() == gradients.keys()
            norm = torch.stack([g.norm() for g in gradients.values()]).norm()
            for name, value in gradients.items():
                difference = (other_gradients[name] - value).norm()
                assert difference <= 5e-3 * value.norm() + 1e-4 * norm, name
