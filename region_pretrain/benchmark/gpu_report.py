"""How well a GPU is used by the steps of a config."""

from __future__ import annotations

import collections
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from region_pretrain.benchmark.measure import (
    make_trainer,
    synthetic_batch,
    synthetic_loader,
    use_images,
)
from region_pretrain.benchmark.plan import Plan, plan_step
from region_pretrain.benchmark.step import repeated_steps
from region_pretrain.benchmark.timing import reset_peak_memory
from region_pretrain.engine.trainer import Trainer
from region_pretrain.reporting.summary import text_table, union_length
from region_pretrain.system import cores

_WARM_UP_STEPS = 4
_PROFILED_STEPS = 3
_COSTLIEST = 10


@dataclass
class GpuUse:
    """Speed and memory of a config's steps in one process; what needs a GPU is None on a CPU.

    Attributes:
        config: the config's name.
        recipe_images: images per GPU in the recipe.
        images: images per step here, fewer if those of the recipe do not fit.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        loaded: images per second with the loader.
        resident: images per second with a batch that stays on the device.
        data_wait: fraction of the time that the loop waits for the loader.
        busy: fraction of the time that the GPU computes, with the resident batch.
        planned_gib: peak memory of the plan.
        peak_gib: peak memory of PyTorch's allocator.
        waits: places that wait for the GPU, with their number per step.
        kernels: the costliest kernels: name, milliseconds per step, launches per step.
    """

    config: str
    recipe_images: int
    images: int
    precision: str
    loaded: float
    resident: float
    data_wait: float
    busy: float | None
    planned_gib: float
    peak_gib: float | None
    waits: dict[str, int] | None
    kernels: list[tuple[str, float, float]] | None


def measure_use(
    cfg: DictConfig,
    name: str,
    gpus: int,
    images: tuple[str, str],
    device: torch.device,
    memory: float,
    seconds: float,
) -> GpuUse:
    """Measure the steps of a config.

    Args:
        cfg: a pre-training config.
        name: its name in the report.
        gpus: processes of the recipe, which determine the images per GPU.
        images: image files and regions of
            :func:`~region_pretrain.benchmark.images.make_jpegs`.
        device: a GPU, or the CPU.
        memory: the device's memory in bytes; the batch is halved until the plan fits.
        seconds: duration of each of the two measurements of speed.
    """
    train = cfg.dataloader.train
    recipe_images = max(1, train.total_batch_size // gpus)
    use_images(cfg, *images)
    plan = _fitting_plan(cfg, recipe_images, images, memory)
    train.total_batch_size = plan.images
    train.num_workers = min(train.num_workers, len(cores()))
    trainer = make_trainer(cfg, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    batch = synthetic_batch(cfg, plan.images)
    batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device)
    with repeated_steps(trainer, lambda start, stop: repeat(batch)) as step:
        seconds_per_step = _time(trainer, step, wait, seconds)[0]
        waits = kernels = peak = busy = None
        if device.type == "cuda":
            reset_peak_memory(device)
            waits = host_waits(step)
            wait()
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            busy_seconds, kernels = profile_kernels(step, wait)
            busy = min(1.0, busy_seconds / seconds_per_step)
    with repeated_steps(trainer, synthetic_loader(cfg)) as step:
        loaded, data_wait = _time(trainer, step, wait, seconds)
    return GpuUse(
        config=name,
        recipe_images=recipe_images,
        images=plan.images,
        precision=plan.precision,
        loaded=plan.images / loaded,
        resident=plan.images / seconds_per_step,
        data_wait=data_wait,
        busy=busy,
        planned_gib=plan.peak / 2**30,
        peak_gib=peak,
        waits=waits,
        kernels=kernels,
    )


def _fitting_plan(cfg: DictConfig, size: int, images: tuple[str, str], memory: float) -> Plan:
    """The plan of one process with at most ``size`` images, halved until they fit."""
    while True:
        mine = copy.deepcopy(cfg)  # planning changes it
        mine.dataloader.train.total_batch_size = size
        plan = plan_step(mine, 1, images)
        fewer = size
        while fewer > max(1, plan.fitting(memory)):
            fewer //= 2
        if fewer == size:
            return plan
        size = fewer


def _time(
    trainer: Trainer, step: Callable[[], None], wait: Callable[[], None], seconds: float
) -> tuple[float, float]:
    """Seconds per step, and the fraction of them spent waiting for data."""
    for _ in range(_WARM_UP_STEPS):
        step()
    wait()
    trainer._reset_clocks()
    started, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - started < seconds:
        step()
        steps += 1
        if steps % 8 == 0:
            wait()  # keeps the host from running far ahead of the clock
    wait()
    spent = time.perf_counter() - started
    return spent / steps, trainer._data_seconds / spent


def host_waits(step: Callable[[], None]) -> dict[str, int]:
    """Count the places of a step where the host waits for the GPU: ``file:line`` -> times."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = (
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "called a synchronizing" in str(w.message)
    )
    return dict(collections.Counter(places))


def profile_kernels(
    step: Callable[[], None], wait: Callable[[], None]
) -> tuple[float, list[tuple[str, float, float]]]:
    """Seconds per step in which the GPU computes, and its costliest kernels."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(_PROFILED_STEPS):
            step()
        wait()
    events = [
        (event.name, event.time_range.start, event.time_range.end)  # in microseconds
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    busy = union_length((start, end) for _, start, end in events)
    return busy / 1e6 / _PROFILED_STEPS, costliest(events, _PROFILED_STEPS)


def costliest(
    events: Sequence[tuple[str, float, float]], steps: int
) -> list[tuple[str, float, float]]:
    """The kernels with the most time: name, milliseconds per step, launches per step.

    Args:
        events: name, start and end in microseconds of each launch.
        steps: number of steps in which they were launched.
    """
    spent: dict[str, list[float]] = {}
    for name, start, end in events:
        spent.setdefault(name, []).append(end - start)
    rows = [(name, sum(t) / 1000 / steps, len(t) / steps) for name, t in spent.items()]
    return sorted(rows, key=lambda row: -row[1])[:_COSTLIEST]


def describe_use(uses: Sequence[GpuUse], machine: str) -> str:
    """Format a report as Markdown.

    Args:
        uses: one entry per config.
        machine: what they were measured on.
    """
    rows = [
        (
            use.config,
            f"{use.images}"
            + (f" (recipe: {use.recipe_images})" * (use.images < use.recipe_images)),
            f"{use.loaded:,.1f}",
            f"{use.resident:,.1f}",
            f"{100 * use.data_wait:.0f} %",
            "-" if use.busy is None else f"{100 * use.busy:.0f} %",
            "-" if use.peak_gib is None else f"{use.peak_gib:.2f}",
            f"{use.planned_gib:.2f}",
            "-" if use.waits is None else f"{sum(use.waits.values())}",
        )
        for use in uses
    ]
    headers = [
        *("config", "images per step", "images/s, loader", "images/s, resident batch"),
        *("waiting for data", "GPU busy", "peak GiB", "planned GiB", "host waits per step"),
    ]
    parts = ["# GPU report", machine, text_table(rows, headers, style="github")]
    for use in uses:
        if use.kernels is None:
            continue
        kernels = [(f"`{_short(k)}`", f"{ms:.2f}", f"{n:.0f}") for k, ms, n in use.kernels]
        parts.append(f"## {use.config}")
        if use.waits:
            waits = ", ".join(f"{place} ({n})" for place, n in use.waits.items())
            parts.append(f"Waits at {waits}.")
        parts.append(text_table(kernels, ["kernel", "ms per step", "launches"], style="github"))
    return "\n\n".join(parts) + "\n"


def _short(kernel: str) -> str:
    kernel = kernel.replace("|", "/")
    return kernel if len(kernel) <= 100 else kernel[:97] + "..."
