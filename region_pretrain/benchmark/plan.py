"""What a training step of a config needs, computed without a GPU and without its arithmetic.

The step runs on fake tensors, which have shapes and no data. Only boxes and indices, which a real
step keeps on the CPU as well, have values: those of synthetic images.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer as optimizers
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils.flop_counter import FlopCounterMode

from region_pretrain.benchmark.images import make_jpegs
from region_pretrain.benchmark.live_memory import LiveMemory, SavedTensors, storage_bytes
from region_pretrain.benchmark.measure import make_trainer, synthetic_batch, use_images
from region_pretrain.benchmark.step import repeated_steps
from region_pretrain.data import photometry
from region_pretrain.errors import UserError
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.norms import SyncBatchNorm
from region_pretrain.reporting.summary import text_table

_IMAGES = 8  # synthetic files, which are repeated
_GIB = 2**30
#: Memory of a GPU that is left to the CUDA context, to cuDNN and to fragmentation.
_RESERVE = 0.1
_GPU_SIZES = (16, 24, 40, 80, 141)  # GiB


@dataclass
class Plan:
    """One step of one process. Memory is in bytes.

    Attributes:
        images: images of the process, the batch size per GPU.
        gpus: number of processes.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        operators: operators that compute something, forward, backward and optimiser.
        flops: floating-point operations of convolutions and matrix products; a multiply-add is two.
        parameters: the trained network's parameters, also frozen ones.
        momentum: momentum copies with their buffers.
        buffers: queues, running statistics and other buffers.
        optimizer: state of the optimiser.
        gradients: gradients of all parameters.
        buckets: DDP's copy of the gradients; 0 for one process.
        pixels: the batch's images.
        saved: maximum that autograd keeps for the backward pass.
        temporary: largest tensor that is neither kept for the backward pass nor a gradient.
        saved_at_peak: part of ``saved`` at the moment of the peak.
        late_peak: largest sum of all tensors after the backward pass, in the optimiser's step.
        peak: largest sum of all tensors that exist at the same time.
    """

    images: int
    gpus: int
    precision: str
    operators: int
    flops: int
    parameters: int
    momentum: int
    buffers: int
    optimizer: int
    gradients: int
    buckets: int
    pixels: int
    saved: int
    temporary: int
    saved_at_peak: int
    late_peak: int
    peak: int

    @property
    def fixed(self) -> int:
        """Memory that does not depend on the batch size."""
        return self.parameters + self.momentum + self.buffers + self.optimizer + self.buckets

    def fitting(self, memory: float) -> int:
        """Images per GPU that fit into a GPU of this many bytes."""
        left = memory * (1 - _RESERVE)
        if left < self.late_peak:
            return 0
        return int((left - self.fixed) * self.images / (self.peak - self.fixed))


def plan_step(cfg: DictConfig, gpus: int, images: tuple[str, str] | None = None) -> Plan:
    """Run two steps on fake tensors, and count in the second.

    Args:
        cfg: a pre-training config, modified in place. A compiled trunk is planned as if it were not
            compiled.
        gpus: number of processes that share ``dataloader.train.total_batch_size``.
        images: the files that replace its images and regions, as returned by
            :func:`~region_pretrain.benchmark.images.make_jpegs`; None creates some.

    Raises:
        UserError: the batch is not a multiple of ``gpus``.
    """
    total = cfg.dataloader.train.total_batch_size
    if gpus < 1 or total % gpus:
        raise UserError(
            f"dataloader.train.total_batch_size={total} is not a multiple of --gpus {gpus}"
        )
    cfg.train.compile = False
    dtype = cfg.train.amp.dtype if cfg.train.amp.enabled else "float32"
    cfg.train.amp.dtype = "bfloat16"  # as large as float16
    with tempfile.TemporaryDirectory() as folder:
        use_images(cfg, *(images or make_jpegs(folder, _IMAGES)))
        batch = synthetic_batch(cfg, total // gpus)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for view in batch.views:
        view.images = fake.from_tensor(view.images)
    trainer = make_trainer(cfg, torch.device("cpu"), lambda model: model._apply(fake.from_tensor))
    model, optimizer = trainer.module, trainer.optimizer
    flops = FlopCounterMode(display=False)
    with ExitStack() as stack:
        step = stack.enter_context(repeated_steps(trainer, lambda start, stop: repeat(batch)))
        stack.enter_context(_simulated_processes(gpus))
        stack.enter_context(_as_on_a_gpu())
        if cfg.train.amp.enabled:
            stack.enter_context(_FloatOnCuda())
        step()
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        own = [*model.parameters(), *model.buffers()]
        saved = SavedTensors(own)
        pixels = [view.images for view in batch.views]
        live = LiveMemory([*own, *state, *gradients, *pixels], saved)
        gradient_bytes = storage_bytes(gradients)
        del gradients
        with flops, saved, live:
            step()
    copies = {p for m in model.modules() if isinstance(m, MomentumCopy) for p in _tensors(m)}
    buckets = gradient_bytes if gpus > 1 else 0
    return Plan(
        images=len(batch),
        gpus=gpus,
        precision=dtype,
        operators=live.operators,
        flops=flops.get_total_flops(),
        parameters=storage_bytes(p for p in model.parameters() if p not in copies),
        momentum=storage_bytes(copies),
        buffers=storage_bytes(b for b in model.buffers() if b not in copies),
        optimizer=storage_bytes(state),
        gradients=gradient_bytes,
        buckets=buckets,
        pixels=storage_bytes(pixels),
        saved=saved.peak,
        temporary=live.largest,
        saved_at_peak=live.peak_saved,
        late_peak=live.late_peak + buckets,
        peak=live.peak + buckets,
    )


def gpus_of(name: str) -> int:
    """Number of GPUs in a config's name, such as 8 in ``soco_r50-fpn_8xb128-100ep_coco``; or 1."""
    found = re.search(r"_(\d+)xb\d+-", name)
    return int(found[1]) if found else 1


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextmanager
def _simulated_processes(world: int) -> Iterator[None]:
    """Collectives behave as if this were the first of several equal processes."""
    if world == 1:
        yield
        return

    def all_gather(parts: Iterable[Tensor], mine: Tensor, **_) -> None:
        for part in parts:
            part.copy_(mine)

    def all_to_all_single(received: Tensor, sent: Tensor, *_, **__) -> None:
        rows = min(len(received), len(sent))
        received.zero_()[:rows].copy_(sent[:rows])

    with (
        mock.patch.object(comm, "get_world_size", lambda: world),
        # It saves the same tensors as SyncBN, which computes in small steps on a CPU.
        mock.patch.object(SyncBatchNorm, "forward", nn.BatchNorm2d.forward),
        mock.patch.object(comm, "_get_global_gloo_group", lambda: None),
        mock.patch.object(dist, "all_reduce", lambda tensor, **_: None),
        mock.patch.object(dist, "all_gather", all_gather),
        mock.patch.object(dist, "all_to_all_single", all_to_all_single),
    ):
        yield


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Process all parameters, and many images, at once, as on a GPU."""
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(photometry, "_PIXELS_IN_CACHE", photometry._PIXELS_AT_ONCE)
        for module in (optimizers, _foreach_utils):
            types = [*module._foreach_supported_types, FakeTensor]
            replace(module, "_foreach_supported_types", types)
            replace(module, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
        yield


class _FloatOnCuda(TorchFunctionMode):
    """Casts to float32 what autocast casts on CUDA but not on a CPU, where memory matters."""

    _FUNCTIONS = frozenset(
        getattr(owner, name)
        for owner in (torch, F, Tensor)
        for name in ("layer_norm", "group_norm", "softmax", "log_softmax")
        if hasattr(owner, name)
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args = tuple(
                a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
            )
        return func(*args, **kwargs)


def describe_plan(name: str, plan: Plan) -> str:
    """Format a plan as Markdown.

    Args:
        name: the config's name.
        plan: its plan.
    """
    images, total = plan.images, plan.images * plan.gpus
    other = plan.peak - plan.fixed - plan.pixels - plan.saved_at_peak
    memory = [
        ("parameters", plan.parameters),
        ("momentum copies", plan.momentum),
        ("queues and other buffers", plan.buffers),
        ("optimiser state", plan.optimizer),
        *([("gradient buckets of DDP", plan.buckets)] if plan.buckets else []),
        ("images", plan.pixels),
        ("saved for the backward pass", plan.saved_at_peak),
        ("gradients and temporary tensors", other),
        ("**peak**", plan.peak),
    ]
    step = [
        ("images per GPU", f"{images:,}"),
        ("operators", f"{plan.operators:,}"),
        ("TFLOP", f"{plan.flops / 1e12:.3g}"),
        ("GFLOP per image", f"{plan.flops / images / 1e9:.3g}"),
        ("GPU-hours per million images, at 100 TFLOP/s", f"{plan.flops / images / 3.6e11:.2f}"),
        ("gradients to average (MiB)", f"{plan.gradients / 2**20:,.0f}" if plan.buckets else "0"),
    ]
    sizes = []
    for size in _GPU_SIZES:
        fitting = plan.fitting(size * _GIB)
        needed = f"{-(-total // fitting):,}" if fitting else "-"
        sizes.append((f"{size}", f"{fitting:,}", needed))
    table = functools.partial(text_table, style="github")
    return "\n\n".join(
        [
            f"## {name}",
            f"{total:,} images per step on {plan.gpus} GPU{'s' * (plan.gpus > 1)}, "
            f"{plan.precision}.",
            table(step, ["per GPU and step", ""]),
            table([(k, f"{v / _GIB:.2f}") for k, v in memory], ["memory at the peak", "GiB"]),
            f"All gradients: {plan.gradients / _GIB:.2f} GiB. Maximum saved for the backward "
            f"pass: {plan.saved / _GIB:.2f} GiB. Largest temporary tensor: "
            f"{plan.temporary / _GIB:.2f} GiB.",
            table(
                sizes,
                ["GPU memory (GiB)", "images per GPU that fit", f"GPUs for {total:,} images"],
                left=0,
            ),
        ]
    )
