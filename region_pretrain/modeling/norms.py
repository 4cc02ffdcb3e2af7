"""Batch norm over the samples of all processes, of one process and of groups of samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

#: Number of samples reported by a rank that has none. CUDA's kernel merges the ranks one by one and
#: would divide 0 by 0; in float32, 1e-30 has no effect next to one sample.
_NO_SAMPLES = 1e-30


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the samples of all processes, on CPU and GPU and for any input rank.

    It computes what one process would compute with ``nn.BatchNorm`` on the concatenated batch, even
    if the processes have different numbers of samples (such as regions) or none. Fewer than two
    samples leave the running statistics unchanged. Statistics are float32, also under autocast.

    ``torch.nn.SyncBatchNorm`` raises on CPU tensors once a process group exists. On a GPU it waits
    for the device three times per forward pass to remove processes without samples, and under
    autocast such a process exchanges bfloat16 with the float32 of the others. Detectron2's
    ``NaiveSyncBatchNorm`` weights processes equally, accepts only 4-D input and tracks the biased
    variance. As a ``BatchNorm2d`` this class is recognised by weight-decay groups and precise batch
    norm, and accepted by DDP on a CPU.

    Shapes: (N, C) or (N, C, ...) to the same shape and dtype.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...) input, got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if comm.get_world_size() == 1 or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        running = self.running_mean, self.running_var
        # Of two or more local samples the kernel updates the statistics in place.
        surely_enough = input.numel() >= 2 * self.num_features
        if self.track_running_stats and not surely_enough:
            running = tuple(buffer.clone() for buffer in running)
        output, counts = _SyncBatchNorm.apply(
            input, self.weight, self.bias, *running, self._next_momentum(), self.eps
        )
        if self.track_running_stats and surely_enough:
            self.num_batches_tracked.add_(1)
        elif self.track_running_stats:
            enough = counts.sum() > 1
            self.num_batches_tracked.add_(enough)
            self.running_mean.copy_(torch.where(enough, running[0], self.running_mean))
            self.running_var.copy_(torch.where(enough, running[1], self.running_var))
        return output

    def _next_momentum(self) -> float:
        if self.momentum is not None or not self.track_running_stats:
            return self.momentum or 0.0
        return 1.0 / (float(self.num_batches_tracked) + 1)  # a cumulative average


class _SyncBatchNorm(torch.autograd.Function):
    """Normalise the samples of all processes; one collective per direction."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns the output and each process's number of samples, ``(P,)`` int32."""
        kernels, channels = _kernels(x), x.shape[1]
        x = _dense(x)
        if x.numel():
            mean, invstd = kernels.batch_norm_stats(x, eps)
            count = mean.new_full((1,), x.numel() / channels)
        else:
            dtype = torch.promote_types(x.dtype, torch.float32)
            mean, invstd = x.new_zeros(channels, dtype=dtype), x.new_ones(channels, dtype=dtype)
            count = mean.new_full((1,), _NO_SAMPLES)
        mine = torch.cat([mean, invstd, count])
        everyone = mine.new_empty(comm.get_world_size() * len(mine))
        dist.all_gather_into_tensor(everyone, mine)
        parts = everyone.view(-1, len(mine)).split([channels, channels, 1], dim=1)
        means, invstds, counts = parts
        counts = counts.reshape(-1)
        mean, invstd = kernels.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        counts = counts.to(torch.int32)
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        ctx.mark_non_differentiable(counts)
        if not x.numel():
            return torch.empty_like(x), counts
        return kernels.batch_norm_elemt(x, weight, bias, mean, invstd, eps), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        kernels, needs = _kernels(x), ctx.needs_input_grad[:3]
        grad = _dense(grad)
        if x.numel():
            total, product, grad_weight, grad_bias = kernels.batch_norm_backward_reduce(
                grad, x, mean, invstd, weight, *needs
            )
        else:  # gradients of 0, not none: DDP waits for them
            total = product = torch.zeros_like(mean)
            grad_weight = torch.zeros_like(weight) if needs[1] else None
            grad_bias = torch.zeros_like(weight) if needs[2] else None
        grad_input = None
        if needs[0]:
            sums = torch.cat([total, product])
            dist.all_reduce(sums)
            if x.numel():
                grad_input = kernels.batch_norm_backward_elemt(
                    grad, x, mean, invstd, weight, *sums.chunk(2), counts
                )
            else:
                grad_input = torch.zeros_like(x)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _kernels(x: Tensor) -> Any:
    return CpuKernels if x.device.type == "cpu" else torch


class CpuKernels:
    """The functions of ``torch`` from which a SyncBN is built on a GPU, for a CPU.

    Channels are dimension 1; ``mean`` and ``invstd`` are ``(C,)``, of several processes ``(P, C)``.
    """

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and 1 / sqrt(biased variance + eps)."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = torch.batch_norm_update_stats(values, None, None, 0.0)
        return mean, (var + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Combine the processes' statistics, and update the running ones in place."""
        total = counts.sum()
        weight = (counts / total)[:, None]
        center = (weight * mean).sum(0)
        # Not E[x^2] - E[x]^2, which loses precision if the mean is large.
        var = (weight * (invstd**-2 - eps + (mean - center) ** 2)).sum(0).clamp(min=0)
        if running_mean is not None:
            running_mean.lerp_(center.to(running_mean.dtype), momentum)
            unbiased = var * (total / (total - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return center, (var + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
    ) -> Tensor:
        """``(x - mean) * invstd * weight + bias``."""
        normalised = (x - _wide(mean, x)) * _wide(invstd, x)
        if weight is not None:
            normalised = normalised * _wide(weight, x) + _wide(bias, x)
        return normalised.to(x.dtype)

    @staticmethod
    def batch_norm_backward_reduce(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        of_input: bool,
        of_weight: bool,
        of_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Sums of ``grad`` and ``grad * (x - mean)``; gradients of weight and bias."""
        dims = [d for d in range(x.dim()) if d != 1]
        total = grad.to(mean.dtype).sum(dims)
        product = (grad * (x - _wide(mean, x))).sum(dims)
        return (
            total,
            product,
            (product * invstd).to(weight.dtype) if of_weight else None,
            total.to(weight.dtype) if of_bias else None,
        )

    @staticmethod
    def batch_norm_backward_elemt(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        total: Tensor,
        product: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """Gradient of the input, from the sums over all processes."""
        samples = counts.sum()
        scale = invstd if weight is None else invstd * weight
        slope = invstd**2 * product / samples
        flat = grad - _wide(total / samples, x) - (x - _wide(mean, x)) * _wide(slope, x)
        return (flat * _wide(scale, x)).to(x.dtype)


def _wide(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))


#: Batch norms whose statistics are those of all processes.
SHARED_BATCH_NORMS = (nn.SyncBatchNorm, SyncBatchNorm)


def use_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every ``nn.SyncBatchNorm`` of a model into a :class:`SyncBatchNorm`, in place.

    For runs with a process group. The modules, their parameters and buffers remain the same
    objects, so optimisers, momentum copies and state dicts are not affected.

    Args:
        model: modified in place.

    Returns:
        The model.
    """
    return _turn_sync_batchnorms_into(SyncBatchNorm, model)


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm over groups of a process's samples, as if each group were on a GPU of its own.

    Known as ghost batch norm (arXiv 1705.08741, section 4). The groups are consecutive samples, at
    most :attr:`group_size` of them, and their sizes differ by at most one. The running statistics
    are moved towards the mean of those of the groups.

    Shapes: (N, C, H, W) to the same shape and dtype.

    Attributes:
        group_size: samples whose statistics are computed together; None: all of the process.
    """

    group_size: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        groups = number_of_groups(len(input), self.group_size) if self.training else 1
        if groups == 1:
            return super().forward(input)
        self._check_input_dim(input)
        parts = input.tensor_split(groups)
        means, variances = [None] * groups, [None] * groups
        if self.track_running_stats:
            means, variances = self.running_mean.new_zeros(2, groups, self.num_features)
        output = torch.cat(
            [
                F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
                for part, mean, variance in zip(parts, means, variances, strict=True)
            ]
        )
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(means.mean(0), momentum)
            self.running_var.lerp_(variances.mean(0), momentum)
        return output


def number_of_groups(samples: int, group_size: int | None) -> int:
    """Groups of a :class:`GhostBatchNorm` on ``samples`` samples, at least 1."""
    return max(1, -(-samples // group_size)) if group_size else 1


def use_local_batchnorm(model: nn.Module, group_size: int | None = None) -> nn.Module:
    """Turn every synchronised batch norm of a model into one of each process, in place.

    As in :func:`use_sync_batchnorm`, modules, parameters and buffers remain the same objects.

    Args:
        model: modified in place; the inputs of its norms are ``(N, C, H, W)``.
        group_size: of :class:`GhostBatchNorm`, which all its 2D batch norms become; None: they are
            ``nn.BatchNorm2d``.

    Returns:
        The model.
    """
    for module in model.modules():
        if type(module) is NaiveSyncBatchNorm:
            module.__class__ = nn.BatchNorm2d
    _turn_sync_batchnorms_into(nn.BatchNorm2d, model)
    if group_size is not None:
        for module in model.modules():
            of_timm = isinstance(module, nn.BatchNorm2d) and hasattr(module, "act")
            if type(module) is nn.BatchNorm2d or of_timm and type(module) is not GhostBatchNorm:
                if type(module) is not nn.BatchNorm2d:
                    module.register_forward_hook(_drop_and_activate)
                module.__class__ = GhostBatchNorm
                module.group_size = group_size
    return model


def broadcast_statistics(network: nn.Module) -> None:
    """Give every process the batch norms' running statistics of the first one.

    They differ where norms do not communicate, or see differently padded images. Checkpoints have
    those of the first process; an evaluation that several processes share needs the same network
    on each. All processes call this together.
    """
    if comm.get_world_size() == 1:
        return
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, 0)


def _turn_sync_batchnorms_into(cls: type[nn.BatchNorm2d], model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = cls  # it has all attributes of the new class
            if hasattr(module, "act"):  # timm's norms include an activation
                module.register_forward_hook(_drop_and_activate)
    return model


def _drop_and_activate(norm: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return norm.act(norm.drop(output))
