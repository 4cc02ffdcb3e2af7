"""Copies from the host to a device that do not make the host wait."""

from __future__ import annotations

import torch
from torch import Tensor

#: CUDA copies pageable memory asynchronously up to this size only.
_STAGED_BYTES = 1 << 16


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the CPU to a device without waiting.

    ``non_blocking`` alone is not enough: the driver waits for the device to copy more than 64 kB of
    pageable memory. Larger tensors are therefore page-locked first, in memory that PyTorch reuses.

    Args:
        tensor: on the CPU, otherwise it is returned unchanged or moved as usual.
        device: the CPU, or a GPU. Copies to an Apple GPU do wait.
    """
    to_gpu = torch.device(device).type not in ("cpu", "meta", "mps")
    if to_gpu and tensor.device.type == "cpu" and tensor.nbytes > _STAGED_BYTES:
        channels_last = tensor.dim() == 4 and tensor.is_contiguous(
            memory_format=torch.channels_last
        )
        tensor = tensor if channels_last else tensor.contiguous()
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
    return tensor.to(device, non_blocking=to_gpu)
