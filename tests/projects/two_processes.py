"""Comparison of two gloo processes with one that has the same global batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.data.batch import ViewBatch
from region_pretrain.engine.processes import leave_process_group
from region_pretrain.modeling.norms import use_sync_batchnorm


class Step(NamedTuple):
    """Outputs and gradients of one step, and the state after it."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def step(
    model: nn.Module,
    batch: ViewBatch,
    outputs: Sequence[str],
    state: Sequence[str],
    module: nn.Module | None = None,
) -> Step:
    """Run step 6 of 10, backward pass included.

    Args:
        model: the model, in ``DistributedDataParallel`` if there are several processes.
        batch: this process's batch.
        outputs: prefixes of the outputs to return.
        state: substrings of the state-dict entries to return.
        module: the unwrapped model, if ``model`` is wrapped.
    """
    module = model if module is None else module
    with EventStorage():
        module.before_step(6, 10)
    found = model(batch)
    sum(value for name, value in found.items() if name.startswith("loss")).backward()
    return Step(
        {n: v.detach() for n, v in found.items() if n.startswith(tuple(outputs))},
        {n: p.grad for n, p in module.named_parameters() if p.grad is not None},
        {n: v.clone() for n, v in module.state_dict().items() if any(s in n for s in state)},
    )


def _rank(rank: int, folder: str, names: Sequence[str], outputs: Any, state: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in names:
        model, batch = torch.load(f"{folder}/{name}.pt", weights_only=False)
        model = use_sync_batchnorm(model)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        mine = step(wrapped, batch.chunk(2)[rank], outputs, state, model)
        for value in mine.outputs.values():
            dist.all_reduce(value)
        found[name] = tuple(mine._replace(outputs={n: v / 2 for n, v in mine.outputs.items()}))
    torch.save(found, f"{folder}/{rank}.pt")
    leave_process_group()


def with_fixed_statistics(model: nn.Module) -> nn.Module:
    """Freeze a model's batch-norm statistics, so that results do not depend on the process."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
        norm.running_var.fill_(2.0)
    return model


def one_and_two_processes(
    cases: dict[str, tuple[nn.Module, ViewBatch]],
    folder: Path,
    outputs: Sequence[str],
    state: Sequence[str],
) -> dict[str, tuple[Step, list[Step]]]:
    """Run each case in one process and in two.

    Args:
        cases: name -> model and global batch.
        folder: an empty folder.
        outputs, state: arguments of :func:`step`.

    Returns:
        For each case the step of one process, and both processes' with averaged outputs.
    """
    one = {}
    for name, (model, batch) in cases.items():
        torch.save((model, batch), folder / f"{name}.pt")
        one[name] = step(model, batch, outputs, state)
    spawn(_rank, (str(folder), list(cases), tuple(outputs), tuple(state)), nprocs=2)
    two = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: (one[name], [Step(*found[name]) for found in two]) for name in cases}


def check_two_are_one(one: Step, two: Sequence[Step]) -> None:
    """Check that outputs, gradients and state of both processes are those of one."""
    norm = torch.stack([g.norm() for g in one.gradients.values()]).norm()
    for other in two:
        assert other.outputs.keys() == one.outputs.keys() and one.outputs
        assert other.gradients.keys() == one.gradients.keys()
        for name, value in one.outputs.items():
            torch.testing.assert_close(other.outputs[name], value, rtol=1e-4, atol=2e-5)
        for name, value in one.gradients.items():
            difference = (other.gradients[name] - value).norm()
            assert difference <= 5e-3 * value.norm() + 1e-4 * norm, name
        for name, value in one.state.items():  # keys at the same positions
            torch.testing.assert_close(other.state[name], value, rtol=1e-3, atol=1e-3)
