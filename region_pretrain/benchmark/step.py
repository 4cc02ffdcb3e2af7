"""A training step compared with its floor: forward and backward of the same networks alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from region_pretrain.benchmark.timing import interleaved, reset_peak_memory
from region_pretrain.engine.memory import peak_memory_mib
from region_pretrain.engine.trainer import Trainer

_PARTS_STEPS = 3
_ENDLESS = 1 << 60  # iterations


@dataclass
class StepRates:
    """The cost of a training step.

    Attributes:
        step: seconds of a complete step from a batch on the CPU: transfer, photometric
            augmentation, forward, backward, target update, optimiser.
        floor: seconds of forward and backward of the networks alone, on tensors of the same shapes.
        images: images per step.
        parts: seconds by part. They are measured separately, with a synchronisation after each
            part, so on a GPU they add up to somewhat more than ``step``.
        memory_mib: peak memory (:func:`~region_pretrain.engine.memory.peak_memory_mib`).
    """

    step: float
    floor: float
    images: int
    parts: dict[str, float]
    memory_mib: float


@dataclass
class Call:
    """One call of a network inside a step.

    Attributes:
        name: the network's name in the model.
        module: the network.
        inputs: ``(shape, dtype, channels_last, requires_grad)`` of each argument.
        grad: whether gradients are computed.
    """

    name: str
    module: nn.Module
    inputs: list[tuple[torch.Size, torch.dtype, bool, bool]] = field(default_factory=list)
    grad: bool = True


def benchmark_step(trainer: Trainer, batch: Any, seconds: float) -> StepRates:
    """Measure repeated steps of a trainer on one batch.

    Args:
        trainer: a trainer that has not started; its model is on its device.
        batch: a batch of the loader.
        seconds: approximate duration of the measurement.
    """
    device = trainer.device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with repeated_steps(trainer, lambda start, stop: itertools.repeat(batch)) as run:

        def step() -> None:
            run()
            wait()

        with recorded_calls(trainer.module) as calls:
            step()
        floor = make_floor(calls, trainer._autocast, device)
        step()
        reset_peak_memory(device)
        step()
        memory = peak_memory_mib(device)
        times = interleaved({"step": step, "floor": lambda: (floor(), wait())}, seconds)
        parts = _parts(trainer, calls, step, wait)
    return StepRates(times["step"], times["floor"], len(batch), parts, memory)


@contextmanager
def repeated_steps(
    trainer: Trainer, data: Callable[[int, int], Iterable[Any]]
) -> Iterator[Callable[[], None]]:
    """Prepare a trainer for single steps, none of which is a log step or checks the losses.

    Args:
        trainer: a trainer that has not started, or whose last context of this kind is closed.
        data: see :class:`~region_pretrain.engine.trainer.Trainer`; it must not end.

    Yields:
        A function that runs one step, without waiting for the device.
    """
    trainer.data = data
    trainer.start_iter, trainer.max_iter = 0, _ENDLESS
    trainer.log_period = _ENDLESS
    trainer.iter = 0
    with EventStorage(0) as storage:
        trainer.storage = storage
        trainer.before_train()

        def step() -> None:
            trainer.run_step()
            trainer.iter += 1
            trainer._unchecked.clear()

        try:
            yield step
        finally:
            trainer._batches = trainer._next_batch = None  # ends the loader's workers


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Record each outermost call of a submodule with parameters while the context is open."""
    calls: list[Call] = []
    depth = 0
    handles = []

    def enter(module: nn.Module, args: tuple, name: str) -> None:
        nonlocal depth
        depth += 1
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if depth > 1 or not tensors or len(tensors) != len(args):
            return
        inputs = [(t.shape, t.dtype, _is_channels_last(t), t.requires_grad) for t in tensors]
        calls.append(Call(name, module, inputs, torch.is_grad_enabled()))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal depth
        depth -= 1

    for name, module in model.named_modules():
        if module is model or not any(True for _ in module.parameters()):
            continue
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(m, a, name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def make_floor(
    calls: Sequence[Call], autocast: Callable[[], Any], device: torch.device
) -> Callable[[], None]:
    """Create a function that runs recorded calls on random tensors, forward and backward.

    Args:
        calls: the calls of :func:`recorded_calls`.
        autocast: creates the context of the forward passes.
        device: device of the tensors.
    """
    prepared: list[tuple[Call, list[Tensor]]] = []
    for call in calls:
        tensors = []
        for shape, dtype, channels_last, requires_grad in call.inputs:
            x = torch.randn(shape, device=device).to(dtype)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            tensors.append(x.requires_grad_(requires_grad))
        prepared.append((call, tensors))
    parameters = {p for call in calls for p in call.module.parameters()}

    def floor() -> None:
        for p in parameters:
            p.grad = None
        outputs: list[Tensor] = []
        for call, tensors in prepared:
            for x in tensors:
                x.grad = None
            with autocast(), nullcontext() if call.grad else torch.no_grad():
                output = call.module(*tensors)
            if call.grad:
                outputs += [y for y in tree_leaves(output) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return floor


def _network(name: str) -> str:
    """``backbone`` for ``backbone.fpn_output2``, ``target.head`` for ``target.head.conv1``."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("target", "key", "roi_heads") else 1])


def _parts(
    trainer: Trainer, calls: Sequence[Call], step: Callable[[], None], wait: Callable[[], None]
) -> dict[str, float]:
    """Mean seconds per step of each part."""
    model = trainer.module
    spent: dict[str, float] = {}
    running: list[tuple[str, float]] = []

    def start(name: str) -> None:
        wait()
        running.append((name, time.perf_counter()))

    def stop() -> None:
        wait()
        name, started = running.pop()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    networks = {call.module: f"forward {_network(call.name)}" for call in calls}
    others = {
        module: f"forward {_network(name)} (no parameters)"
        for name, module in model.named_modules()
        if module is not model
        and not any(True for _ in module.parameters())
        and not any(module in set(network.modules()) for network in networks)
        and type(module).__name__ != "Identity"
    }
    depth = 0
    handles = []

    def enter(module: nn.Module, name: str) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            start(name)

    def leave() -> None:
        nonlocal depth
        if depth == 1:
            stop()
        depth -= 1

    for module, name in {**networks, **others}.items():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(m, name)))
        handles.append(module.register_forward_hook(lambda m, a, y: leave(), always_call=True))
    handles.append(model.register_forward_pre_hook(lambda m, a: start("complete forward")))
    handles.append(model.register_forward_hook(lambda m, a, y: stop(), always_call=True))

    def wrap(owner: Any, method: str, name: str) -> Callable[[], None]:
        if not hasattr(owner, method):
            return lambda: None
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start(name)
            try:
                return original(*args, **kwargs)
            finally:
                stop()

        setattr(owner, method, timed)
        return lambda: delattr(owner, method)

    undo = [
        wrap(model, "before_step", "hooks around the step (target update)"),
        wrap(model, "after_step", "hooks around the step (target update)"),
        wrap(trainer, "_forward_backward", "forward and backward"),
        wrap(trainer, "_optimizer_step", "optimiser"),
    ]
    try:
        start("step")
        for _ in range(_PARTS_STEPS):
            step()
        stop()
    finally:
        for handle in handles:
            handle.remove()
        for function in undo:
            function()
    spent = {name: seconds / _PARTS_STEPS for name, seconds in spent.items()}
    total, both = spent.pop("step"), spent.pop("forward and backward")
    forward = spent.pop("complete forward")
    inner = sum(seconds for name, seconds in spent.items() if name.startswith("forward "))
    spent["forward, other (regions, losses)"] = forward - inner
    spent["backward"] = both - forward
    spent["other (transfer)"] = total - sum(spent.values())
    return spent
