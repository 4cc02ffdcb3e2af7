"""The memory of a step, counted from its tensors; they may be fake."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """While open, counts the bytes that autograd keeps from the forward to the backward pass.

    Args:
        excluded: tensors that exist anyway, such as parameters.

    Attributes:
        bytes: bytes of the storages that are saved now, each counted once.
        peak: maximum of ``bytes``.
        ever: the storages that have been saved.
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self.bytes = self.peak = 0
        self._excluded = {t.untyped_storage()._cdata for t in excluded}
        self._uses: collections.Counter[int] = collections.Counter()
        self.ever: set[int] = set()
        super().__init__(lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor)

    def _add(self, storage: torch.UntypedStorage) -> bool:
        key = storage._cdata
        if key in self._excluded:
            return False
        if key not in self._uses:
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
        self._uses[key] += 1
        self.ever.add(key)
        return True

    def _remove(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self.bytes -= storage.nbytes()


class _Saved:
    """A saved tensor; autograd drops it once its node has run backward, or can no longer run."""

    def __init__(self, tensor: Tensor, counter: SavedTensors) -> None:
        self.tensor = tensor
        self._counter = counter if counter._add(tensor.untyped_storage()) else None

    def __del__(self) -> None:
        if self._counter is not None:
            self._counter._remove(self.tensor.untyped_storage())


class LiveMemory(TorchDispatchMode):
    """While active, counts the operators on fake tensors and the bytes of those that are alive.

    An operator's own workspace is not counted.

    Args:
        present: fake tensors that already exist.
        saved: counts what autograd saves at the same time.

    Attributes:
        operators: number of operators, without views.
        bytes: bytes of the storages that are alive.
        peak: maximum of ``bytes``.
        peak_saved: bytes of those that autograd had saved at the peak.
        late_peak: maximum since autograd last had a saved tensor, i.e. in the optimiser's step.
        largest: bytes of the largest storage that was created and not saved for the backward pass.
    """

    def __init__(self, present: Iterable[Tensor], saved: SavedTensors) -> None:
        super().__init__()
        self.operators = self.bytes = self.peak = self.peak_saved = self.late_peak = (
            self.largest
        ) = 0
        self._saved = saved
        self._alive: dict[int, weakref.ref] = {}
        for tensor in present:
            self._add(tensor, new=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fakes = [t for t in tree_leaves(out) if isinstance(t, FakeTensor)]
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if fakes or not aliases:  # `_foreach_add_` returns nothing
            self.operators += func.namespace != "prim" and not is_view
        for tensor in fakes:
            self._add(tensor)
        return out

    def _add(self, tensor: Tensor, new: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._saved.ever.discard(key)  # of a storage that is gone

        def died(_: weakref.ref) -> None:
            self.bytes -= size
            del self._alive[key]
            if new and key not in self._saved.ever:
                self.largest = max(self.largest, size)

        self._alive[key] = weakref.ref(storage, died)
        self.bytes += size
        if self.bytes > self.peak:
            self.peak, self.peak_saved = self.bytes, self._saved.bytes
        self.late_peak = 0 if self._saved.bytes else max(self.late_peak, self.bytes)
