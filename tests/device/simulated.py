"""A GPU that is not there: a device whose tensors compute on the CPU and obey CUDA's rules.

PyTorch's PrivateUse1 backend is renamed to ``gpu`` and implemented in Python. As on CUDA, an
operation on a tensor of the device and one of the CPU raises. What would make the host wait for the
device is recorded with the line that did it, as are decisions taken in half precision.

The backend can be registered only once, and not removed: use it in a process of its own.
"""

from __future__ import annotations

import collections
import traceback
from pathlib import Path

import torch
from torch.optim import optimizer as optimizers
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from region_pretrain.modeling.norms import CpuKernels

aten = torch.ops.aten
NAME = "gpu"
#: Copies of pageable memory up to this size are staged by the driver, and do not wait.
STAGED_BYTES = 1 << 16
#: Directories whose lines are worth naming.
_OURS = ("/region_pretrain/", "/projects/", "/device/planted.py")

#: Operations whose result, or its size, is read by the host.
_WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
#: Choices, comparisons and losses, which bfloat16's three digits would change.
_DECISIONS = {
    *("argmax", "argmin", "topk", "sort", "argsort", "logsumexp", "_log_softmax", "_softmax"),
    *("nll_loss_forward", "mse_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits"),
    *("gt", "ge", "lt", "le", "eq", "ne", "maximum", "minimum", "linalg_vector_norm"),
}
#: Kernels that PyTorch has only for CUDA.
_ONLY_CUDA = {
    getattr(aten, name).default: getattr(CpuKernels, name)
    for name in vars(CpuKernels)
    if name.startswith("batch_norm")
}


def _in_float32(func):
    """Computed in float32 and rounded: many CPUs emulate bfloat16, several times slower."""

    def compute(*args):
        kinds = {t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        if kinds != {torch.bfloat16}:
            return func(*args)  # which raises if they differ
        wide = tree_map(lambda t: t.float() if isinstance(t, torch.Tensor) else t, args)
        return tree_map(lambda t: t if t is None else t.bfloat16(), func(*wide))

    return compute


_CONVOLUTIONS = {
    f: _in_float32(f) for f in (aten.convolution.default, aten.convolution_backward.default)
}
#: What autocast casts on CUDA, as far as the models use it.
_TO_HALF = ("convolution", "conv2d", "linear", "matmul", "mm", "mv", "bmm", "addmm", "baddbmm")
_TO_FLOAT = (
    *("softmax.int", "log_softmax.int", "nll_loss", "mse_loss", "layer_norm", "group_norm"),
    *(
        "linalg_vector_norm",
        "norm.ScalarOpt_dim",
        "exp",
        "log",
        "rsqrt",
        "reciprocal",
        "pow.Scalar",
    ),
    *("sum", "sum.dim_IntList", "cosine_similarity", "binary_cross_entropy_with_logits"),
)
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}


class Record:
    """What happened on the device since the last :meth:`clear`."""

    def __init__(self) -> None:
        self.waits: collections.Counter[str] = collections.Counter()
        self.half: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[str] = collections.Counter()

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()


RECORD = Record()
_pinned: dict[int, torch.Tensor] = {}  # address -> page-locked tensor, kept alive


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> torch.device:
    """Register the device. Tensors are created on it within :class:`Simulation`."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _register_autocast()
    for supported in (optimizers._foreach_supported_types, _foreach_utils._foreach_supported_types):
        supported.append(DeviceTensor)

    def pin_memory(tensor: torch.Tensor, device: None = None) -> torch.Tensor:
        locked = tensor.clone()
        _pinned[locked.untyped_storage().data_ptr()] = locked
        return locked

    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = _is_pinned
    return torch.device(NAME, 0)


def _register_autocast() -> None:
    key = "AutocastPrivateUse1"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    global _LIBRARIES
    _LIBRARIES = torch.library.Library("_", "IMPL", key), torch.library.Library("aten", "IMPL", key)
    _LIBRARIES[0].fallback(torch.library.fallthrough_kernel)

    def register(name: str, half: bool) -> None:
        base, _, overload = name.partition(".")
        operation = getattr(getattr(aten, base), overload or "default")

        def kernel(*args, **kwargs):
            dtype = torch.get_autocast_dtype(NAME) if half else torch.float32

            def cast(t):
                ours = isinstance(t, torch.Tensor) and t.device.type == NAME
                return t.to(dtype) if ours and t.is_floating_point() else t

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

        _LIBRARIES[1].impl(name, kernel)

    for name in _TO_HALF:
        register(name, half=True)
    for name in _TO_FLOAT:
        register(name, half=False)


def _is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _pinned


class DeviceTensor(torch.Tensor):
    """A tensor on the device; ``inner`` is the tensor on the CPU that contains its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    @property
    def data(self) -> DeviceTensor:
        return DeviceTensor(self.inner)

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        self.inner = value.inner

    def tolist(self):
        _note(RECORD.waits, "tolist")
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of the device to numpy: use Tensor.cpu()")


class Simulation(TorchDispatchMode):
    """While this mode is active, tensors can be created on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _note(counter: collections.Counter[str], what: str) -> None:
    frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in _OURS)]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "backward"
    counter[f"{what} at {where}"] += 1


def _dispatch(func, args, kwargs):
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    mine = [t for t in leaves if isinstance(t, DeviceTensor)]
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == NAME
    if not mine and not to_device:
        return func(*args, **kwargs)
    _check(func, args, kwargs, leaves, mine, to_device)

    args, kwargs = tree_map(
        lambda t: t.inner if isinstance(t, DeviceTensor) else t, (given := (args, kwargs))
    )
    if to_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = (_ONLY_CUDA | _CONVOLUTIONS).get(func, func)(*args, **kwargs)
    if device is not None and not to_device:
        return out  # a copy to the CPU
    if func is aten._to_copy.default and any(out is t for t in tree_leaves(args)):
        out = out.clone()
    return _wrap(func, given, out)


def _check(func, args, kwargs, leaves, mine, to_device) -> None:
    """Raise if devices are mixed, and record waits, half-precision decisions and kernels."""
    foreign = [t for t in leaves if not isinstance(t, DeviceTensor) and t.dim() > 0]
    if mine and foreign and func not in _COPIES | _INDEXING:
        shapes = ", ".join(str(tuple(t.shape)) for t in foreign)
        raise RuntimeError(f"{func}: tensors on {NAME}:0, and of shape {shapes} on the CPU")
    name = func._schema.name.partition("::")[2]
    aliases = [r.alias_info for r in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    if not is_view and name not in _ALLOCATIONS:
        RECORD.kernels[name] += 1
    if func in _WAITING and mine:
        _note(RECORD.waits, name)
    if func in _INDEXING:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            _note(RECORD.waits, "index by a mask")
        if any(not isinstance(i, DeviceTensor) and i.dim() for i in indices):
            _note(RECORD.waits, "index on the CPU")
    if name in _DECISIONS and any(t.dtype in (torch.bfloat16, torch.float16) for t in mine):
        _note(RECORD.half, name)
    if func in _COPIES:
        _check_copy(func, args, kwargs, to_device)


def _check_copy(func, args, kwargs, to_device) -> None:
    source, target = args[0], to_device or kwargs.get("device") is None
    asynchronous = kwargs.get("non_blocking", False)
    if func is aten.copy_.default:
        source, target = args[1], isinstance(args[0], DeviceTensor)
        asynchronous = asynchronous or True in args[2:]
    if isinstance(source, DeviceTensor):
        if not target:
            _note(RECORD.waits, "copy to the CPU")
    elif target and source.numel() and (source.dim() or to_device):
        size = source.numel() * source.element_size()
        dense = source.dim() == 4 and source.is_contiguous(memory_format=torch.channels_last)
        locked = _is_pinned(source) and (dense or source.is_contiguous())
        if not asynchronous:
            _note(RECORD.waits, "blocking copy to the device")
        elif size > STAGED_BYTES and not locked:
            _note(RECORD.waits, f"copy of {size} pageable bytes to the device")


def _wrap(func, given, out):
    """Wrap new tensors; an argument that was written to is returned as it was given."""

    def wrap(t):
        new = isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)
        return DeviceTensor(t) if new else t

    args, kwargs = given
    schema = func._schema
    values = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    written = {
        name: values.get(a.name)
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
        for name in a.alias_info.before_set
    }
    same = [
        (
            next((written[s] for s in r.alias_info.before_set if s in written), None)
            if r.alias_info is not None and r.alias_info.is_write
            else None
        )
        for r in schema.returns
    ]
    if len(same) == 1:
        return tree_map(wrap, out) if same[0] is None else same[0]
    if not any(s is not None for s in same):
        return tree_map(wrap, out)
    return tuple(wrap(o) if s is None else s for s, o in zip(same, out, strict=True))
