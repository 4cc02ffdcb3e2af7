"""NCCL's rules for the simulated device, over gloo."""

from __future__ import annotations

from unittest import mock

import torch
from detectron2.utils import comm
from simulated import RECORD, DeviceTensor
from torch import distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

_NAMES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast"),
    *("reduce_scatter_tensor", "reduce", "gather", "scatter", "all_to_all"),
)


class DeviceGroup:
    """While open, the default group accepts tensors of the device only; other groups, of the CPU.

    The calls on the default group are recorded. NCCL would hang or return garbage if they differed
    between processes in kind, dtype or size.
    """

    def __init__(self) -> None:
        self._calls: list[str] = []
        self._patches: list = []
        self._side = dist.new_group(backend="gloo")

    def calls(self) -> list[str]:
        found, self._calls = self._calls, []
        return found

    def __enter__(self) -> DeviceGroup:
        self._calls = []
        self._patches = [
            mock.patch.object(dist, name, self._wrapped(name, getattr(dist, name)))
            for name in _NAMES
        ]
        # Detectron2 makes this group for NCCL's processes.
        self._patches.append(mock.patch.object(comm, "_get_global_gloo_group", lambda: self._side))
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()

    def _wrapped(self, name: str, function):
        def call(*args, group=None, **kwargs):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            on_device = [isinstance(t, DeviceTensor) for t in tensors]
            if group not in (None, dist.group.WORLD):
                if any(on_device):
                    raise RuntimeError(f"{name}: a tensor of the device in a group of the CPU")
                return function(*args, group=group, **kwargs)
            if not all(on_device):
                raise RuntimeError(f"{name}: no backend of the group accepts tensors of the CPU")
            RECORD.kernels[name] += 1
            # The processes of an all-to-all have different numbers of rows.
            shapes = [t.shape[1:] if name == "all_to_all_single" else t.shape for t in tensors]
            what = [f"{tuple(s)} {t.dtype}" for s, t in zip(shapes, tensors, strict=True)]
            self._calls.append(f"{name} {', '.join(what)}")
            args, kwargs = tree_map(
                lambda t: t.inner if isinstance(t, DeviceTensor) else t, (args, kwargs)
            )
            function(*args, **kwargs)

        return call
