"""Batch norm across processes on CPUs, and per process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import nn


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the samples of all processes, on any device and for any input rank.

    ``torch.nn.SyncBatchNorm`` raises on CPU tensors as soon as a process group exists, and
    Detectron2's ``NaiveSyncBatchNorm`` weights processes equally, accepts only 4-D input and tracks
    the biased variance. This one computes what one process would compute with ``nn.BatchNorm``
    on the concatenated batch, even if the processes have different numbers of samples (such as
    regions) or none. As a ``BatchNorm2d`` it is recognised by weight-decay groups and precise batch
    norm.

    Shapes: (N, C) or (N, C, ...) to the same shape and dtype; statistics are computed in float32.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...) input, got shape {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if comm.get_world_size() == 1 or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        dims = [d for d in range(input.dim()) if d != 1]
        per_channel = (1, -1) + (1,) * (input.dim() - 2)
        values = input.float()

        # Two passes: E[x^2] - E[x]^2 loses precision if the mean is large.
        count = values.new_tensor([values.numel() // self.num_features])
        total = differentiable_all_reduce(torch.cat([values.sum(dims), count]))  # (C + 1,)
        count = total[-1].detach().clamp(min=1)
        mean = total[:-1] / count
        centered = values - mean.view(per_channel)
        var = differentiable_all_reduce(centered.square().sum(dims)) / count

        output = centered * torch.rsqrt(var + self.eps).view(per_channel)
        if self.weight is not None:
            output = output * self.weight.view(per_channel)
        if self.bias is not None:
            output = output + self.bias.view(per_channel)
        if self.track_running_stats and total[-1] > 0:
            self._update_running_stats(mean.detach(), var.detach(), count)
        return output.to(input.dtype)

    def _update_running_stats(
        self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor
    ) -> None:
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # cumulative average, like nn.BatchNorm2d
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


#: Batch norms whose statistics are those of all processes.
SHARED_BATCH_NORMS = (nn.SyncBatchNorm, CpuSyncBatchNorm)


def use_cpu_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every ``nn.SyncBatchNorm`` in a model by :class:`CpuSyncBatchNorm`.

    For CPU runs with a process group, even of one process. The new layers have the same parameter
    and buffer objects, so optimisers and state dicts are not affected.

    Args:
        model: modified in place.

    Returns:
        The model, or its replacement if the model itself is a ``nn.SyncBatchNorm``.
    """
    return _replace_sync_batchnorm(model, CpuSyncBatchNorm)


def use_local_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every ``nn.SyncBatchNorm`` in a model by a per-process ``nn.BatchNorm2d``.

    Like with :func:`use_cpu_sync_batchnorm`, parameters and buffers remain the same objects.

    Args:
        model: modified in place; the inputs of its norms are ``(N, C, H, W)``.

    Returns:
        The model, or its replacement if the model itself is a ``nn.SyncBatchNorm``.
    """
    return _replace_sync_batchnorm(model, nn.BatchNorm2d)


def _replace_sync_batchnorm(model: nn.Module, make: Callable[..., nn.Module]) -> nn.Module:
    replaced: dict[nn.Module, nn.Module] = {}

    def replacement(norm: nn.SyncBatchNorm) -> nn.Module:
        if norm not in replaced:
            new = make(
                norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
            )
            new._parameters.update(norm._parameters)
            new._buffers.update(norm._buffers)
            if hasattr(norm, "act"):  # timm's norms include an activation
                new.drop, new.act = norm.drop, norm.act
                new.register_forward_hook(_drop_and_activate)
            replaced[norm] = new.train(norm.training)
        return replaced[norm]

    if isinstance(model, nn.SyncBatchNorm):
        return replacement(model)
    for module in list(model.modules()):
        # Not named_children(): it skips the second name of a layer that is shared under two names.
        for name, child in module._modules.items():
            if isinstance(child, nn.SyncBatchNorm):
                module._modules[name] = replacement(child)
    return model


def _drop_and_activate(norm: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return norm.act(norm.drop(output))
