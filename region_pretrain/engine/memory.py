"""Peak memory of this process."""

from __future__ import annotations

import resource

import torch


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far, in MiB.

    On a GPU this is the memory of PyTorch's allocator; on a CPU, the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with open("/proc/self/status", encoding="ascii") as file:
        peak = [line for line in file if line.startswith("VmHWM")]
    if peak:
        return int(peak[0].split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
