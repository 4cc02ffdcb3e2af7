"""Complete training steps of a method, against a slow and obvious restatement of them.

The library's side is the real trainer: EMA, forward, backward, optimiser. A :class:`Restatement`
repeats the steps on deep copies ("twins") of the model. It calls the detector's modules and the
heads as black boxes, in the library's order so that batch-norm statistics agree, and writes out all
that makes the method. After every step, outputs, gradients, parameters and buffers must agree.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from forked import LONG
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.data.batch import ViewBatch
from region_pretrain.engine.trainer import Trainer
from region_pretrain.modeling.norms import use_sync_batchnorm

LR, SGD_MOMENTUM = 0.05, 0.9


class Precision(NamedTuple):
    """How a case is computed, and how closely both sides must agree.

    Errors are relative to a tensor's norm, or to 1 (outputs, state) or a tenth of the norm of all
    gradients where that is more: a bias before a batch norm has a gradient of rounding errors.
    """

    dtype: torch.dtype
    autocast: bool
    outputs: float
    gradients: float
    state: float


PRECISIONS = {
    "float64": Precision(torch.float64, False, 1e-9, 1e-9, 1e-9),
    "float32": Precision(torch.float32, False, 1e-5, 1e-5, 1e-5),
    # Equal weights have equal activations, but in backward sums are rounded to 8 bits elsewhere.
    "bfloat16": Precision(torch.float32, True, 1e-5, 5e-2, 1e-2),
}


class Record(NamedTuple):
    """What a step computed, and every parameter and buffer after it."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    state: dict[str, Tensor]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, lr=LR, momentum=SGD_MOMENTUM)


class Case(NamedTuple):
    """A training run.

    Attributes:
        model: in training mode.
        batches: one global batch for each step.
        precision: a key of ``PRECISIONS``.
        optimizer: builds the optimiser; must be importable by name if two processes train.
    """

    model: nn.Module
    batches: list[ViewBatch]
    precision: str = "float64"
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd


def _record(module: nn.Module, outputs: dict[str, Tensor]) -> Record:
    parameters = dict(module.named_parameters())
    return Record(
        {name: value.detach().clone() for name, value in outputs.items()},
        {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        {n: t.detach().clone() for n, t in (parameters | dict(module.named_buffers())).items()},
    )


@contextmanager
def _float64_stays(precision: Precision) -> Iterator[None]:
    """``Tensor.float()``, which undoes autocast before a loss, leaves float64 as it is."""
    cast = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        if precision.dtype == torch.float64:
            keep = lambda t: t if t.dtype == torch.float64 else cast(t)  # noqa: E731
            patch.setattr(torch.Tensor, "float", keep)
        yield


class _Recorder(HookBase):
    def __init__(self, module: nn.Module) -> None:
        self.module, self.records = module, []
        module.register_forward_hook(lambda module, inputs, outputs: self._see(outputs))

    def _see(self, outputs: dict[str, Tensor]) -> None:
        self.outputs = outputs

    def after_step(self) -> None:
        self.records.append(_record(self.module, self.outputs))


def train(
    case: Case,
    batches: Sequence[ViewBatch],
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> list[Record]:
    """A run of the library's trainer on this process's batches, one record for each step.

    PyTorch's generator is seeded with the process's rank.
    """
    model, precision = case.model, PRECISIONS[case.precision]
    recorder, optimizer = _Recorder(model), case.optimizer(model)
    torch.manual_seed(comm.get_rank())
    dtype = torch.bfloat16 if precision.autocast else None
    trainer = Trainer(
        wrap(model), optimizer, lambda *_: iter(batches), amp_dtype=dtype, log_period=1
    )
    trainer.register_hooks([recorder])
    with _float64_stays(precision):
        trainer.train(0, len(batches))
    return recorder.records


class Restatement(ABC):
    """Base class of the slow side; a subclass restates one method.

    Args:
        case: its model is copied, not changed.
        ranks: 1 for a twin that sees the global batch (SyncBN); 2 for two twins, each with half of
            the batch and batch-norm statistics of its own.
    """

    #: Whether the momentum copies follow the optimiser's step instead of preceding the forward.
    average_after_step = False

    def __init__(self, case: Case, ranks: int = 1) -> None:
        self.precision = PRECISIONS[case.precision]
        self.twins = [copy.deepcopy(case.model) for _ in range(ranks)]
        self.velocities: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        self.iteration = self.max_iter = 0

    @abstractmethod
    def copies(self, twin: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """(online module, its momentum copy) pairs of a twin."""

    @abstractmethod
    def momentum(self, progress: float) -> float:
        """EMA momentum at a fraction of the run."""

    @abstractmethod
    def forward(self, batches: list[ViewBatch]) -> list[dict[str, Tensor]]:
        """Outputs of each twin for its part of the batch in step ``self.iteration``.

        A method with a queue also writes it to the twins' buffers.
        """

    def update(self, twin: nn.Module, velocity: dict[str, Tensor]) -> None:
        """The optimiser's step: SGD. ``velocity`` is its state, by parameter name."""
        for name, p in twin.named_parameters():
            gradient = 0.0 if p.grad is None else p.grad
            velocity[name] = SGD_MOMENTUM * velocity.get(name, 0.0) + gradient
            p.data = p.data - LR * velocity[name]

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module as a black box, under the case's autocast."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision.autocast):
            return module(x)

    def run(self, batches: Sequence[ViewBatch], found: list[list[Record]]) -> list[list[Record]]:
        """For each twin one record for each step.

        Args:
            batches: global batches.
            found: the library's records for each process. Below float64, where small errors grow
                fast, every step starts from the library's parameters, buffers and SGD momentum.
        """
        records: list[list[Record]] = [[] for _ in self.twins]
        self.max_iter = len(batches)
        with _float64_stays(self.precision):
            for self.iteration, batch in enumerate(batches):
                for rank, record in enumerate(self._step(batch)):
                    records[rank].append(record)
                    if self.precision.dtype != torch.float64:
                        self._restart(rank, record, found[rank][self.iteration])
        return records

    def _restart(self, rank: int, mine: Record, library: Record) -> None:
        twin, velocity = self.twins[rank], self.velocities[rank]
        for name, value in [*twin.named_parameters(), *twin.named_buffers()]:
            value.data.copy_(library.state[name])
        for name, gradient in mine.gradients.items():
            if gradient is not None:
                velocity[name] += library.gradients[name] - gradient

    def _average(self) -> None:
        m = self.momentum(self.iteration / self.max_iter)
        for twin in self.twins:
            for online, average in self.copies(twin):
                online_parameters = dict(online.named_parameters())
                for name, p in average.named_parameters():
                    assert not p.requires_grad, name  # so no optimiser changes it
                    mine, other = p.data, online_parameters[name].data
                    p.data = m * mine + (1 - m) * other
                    if self.precision.autocast:  # the same, rounded as in the library
                        p.data = torch.lerp(mine, other, 1 - m)

    def _step(self, batch: ViewBatch) -> list[Record]:
        if not self.average_after_step:
            self._average()
        for twin in self.twins:
            twin.zero_grad(set_to_none=True)
        outputs = self.forward(batch.chunk(len(self.twins)))
        losses = [v for found in outputs for name, v in found.items() if name.startswith("loss")]
        sum(losses).backward()  # together: the twins may share a batch norm's statistics
        for same in zip(*(twin.parameters() for twin in self.twins), strict=True):
            if same[0].grad is not None:  # DDP averages
                mean = sum(p.grad for p in same) / len(same)
                for p in same:
                    p.grad = mean.clone()
        for twin, velocity in zip(self.twins, self.velocities, strict=True):
            self.update(twin, velocity)
        if self.average_after_step:
            self._average()
        return [_record(*pair) for pair in zip(self.twins, outputs, strict=True)]


def check(found: Sequence[Record], expected: Sequence[Record], precision: Precision) -> None:
    """The library's records are those of the restatement.

    A parameter for which the restatement has no gradient must have none, or one of zeros.
    """
    assert len(found) == len(expected) >= 2
    for step, (mine, slow) in enumerate(zip(found, expected, strict=True)):
        assert mine.outputs.keys() == slow.outputs.keys()
        for name, value in slow.outputs.items():
            error = abs(mine.outputs[name].item() - value.item()) / max(1, abs(value.item()))
            assert error <= precision.outputs, (step, name, error)
            assert mine.outputs[name].dtype == value.dtype, (step, name)
        assert mine.gradients.keys() == slow.gradients.keys()
        used = {name: g for name, g in slow.gradients.items() if g is not None}
        total = torch.stack([g.norm() for g in used.values()]).norm()
        for name, gradient in mine.gradients.items():
            if name not in used:
                assert gradient is None or not gradient.any(), (step, name)
                continue
            error = (gradient - used[name]).norm() / max(used[name].norm(), total / 10)
            assert error <= precision.gradients, (step, name, error)
        assert mine.state.keys() == slow.state.keys()
        for name, value in slow.state.items():
            assert mine.state[name].dtype == value.dtype, name
            error = (mine.state[name] - value).double().norm() / max(1, value.double().norm())
            tolerance = precision.state if value.is_floating_point() else 0
            assert error <= tolerance, (step, name, error)


def check_one_process(case: Case, restatement: Restatement) -> list[Record]:
    """The trainer in this process against a restatement with one twin; returns the records."""
    found = train(case, case.batches)
    (expected,) = restatement.run(case.batches, [found])
    check(found, expected, restatement.precision)
    return found


def _join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=LONG),
    )


def _train_part(path: str) -> None:
    case = Case(*torch.load(path, weights_only=False))
    rank = dist.get_rank()
    records = train(
        case._replace(model=use_sync_batchnorm(case.model)),
        [batch.chunk(2)[rank] for batch in case.batches],
        lambda model: DistributedDataParallel(model, broadcast_buffers=False),
    )
    torch.save(records, f"{path}.{rank}")


class TwoProcesses:
    """Two gloo processes, started once for all tests, that train with half of every batch each."""

    def __init__(self, folder: Path) -> None:
        self.path, context = str(folder / "case.pt"), get_context("spawn")
        self.ranks = [
            ProcessPoolExecutor(1, context, initializer=_join, initargs=(rank, str(folder)))
            for rank in range(2)
        ]

    def check(self, case: Case, restatement: Restatement) -> list[list[Record]]:
        """The trainers against a restatement; returns the records of each process.

        With two twins each process is compared with its own. With one twin, which sees the global
        batch, both are, and the mean of their losses must be its loss; other outputs are ignored.
        """
        torch.save(tuple(case), self.path)
        for done in [rank.submit(_train_part, self.path) for rank in self.ranks]:
            done.result()
        found = [torch.load(f"{self.path}.{rank}", weights_only=False) for rank in range(2)]
        expected = restatement.run(case.batches, found)
        if len(expected) == 1:
            losses = [name for name in expected[0][0].outputs if name.startswith("loss")]
            means = [
                {name: (a.outputs[name] + b.outputs[name]) / 2 for name in losses}
                for a, b in zip(*found, strict=True)
            ]
            found = [
                [step._replace(outputs=mean) for step, mean in zip(rank, means, strict=True)]
                for rank in found
            ]
            expected = 2 * [
                [
                    s._replace(outputs={name: s.outputs[name] for name in losses})
                    for s in expected[0]
                ]
            ]
        for mine, slow in zip(found, expected, strict=True):
            check(mine, slow, restatement.precision)
        return found

    def close(self) -> None:
        for rank in self.ranks:
            rank.shutdown()
