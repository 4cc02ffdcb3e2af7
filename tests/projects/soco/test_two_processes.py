"""Two gloo processes against one with the same global batch: losses and gradients."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.modeling.norms import use_cpu_sync_batchnorm


def _losses_and_gradients(model, batch, module):
    with EventStorage():
        module.before_step(300, 1000)
    outputs = model(batch)
    losses = {k: v for k, v in outputs.items() if k.startswith("loss")}
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, gradients


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = use_cpu_sync_batchnorm(torch.load(f"{folder}/model.pt", weights_only=False))
    batch = torch.load(f"{folder}/batch.pt", weights_only=False).chunk(2)[rank]
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    losses, gradients = _losses_and_gradients(wrapped, batch, model)
    for value in losses.values():
        dist.all_reduce(value)
    torch.save(({k: v / 2 for k, v in losses.items()}, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("all_levels", [False, True])
def test_two_processes_are_one(small_soco, make_batch, tmp_path, all_levels):
    scales = (16, 32, 60, 64)
    model = small_soco(level_scales=scales, all_levels=all_levels, zero_init=False).train()
    batch = make_batch(4, (64, 64, 32), seed=4)
    torch.save(model, tmp_path / "model.pt")
    torch.save(batch, tmp_path / "batch.pt")
    losses, gradients = _losses_and_gradients(model, batch, model)
    spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        other_losses, other_gradients = torch.load(tmp_path / f"{rank}.pt")
        for name, value in losses.items():
            torch.testing.assert_close(other_losses[name], value, rtol=1e-4, atol=2e-5)
        assert other_gradients.keys() == gradients.keys()
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, value in gradients.items():
            difference = (other_gradients[name] - value).norm()
            assert difference <= 5e-3 * value.norm() + 1e-4 * norm, name
