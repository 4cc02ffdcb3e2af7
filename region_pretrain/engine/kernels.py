"""Settings of cuDNN and of matrix products on a GPU; what a CPU has no kernels for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from region_pretrain.errors import UserError

_PRECISIONS = ("highest", "high", "medium")


def use_fast_kernels(train: Mapping[str, Any], device: torch.device) -> None:
    """Apply ``train.cudnn_benchmark`` and ``train.float32_matmul_precision`` to a run on a GPU.

    Raises:
        UserError: PyTorch does not know this precision.
    """
    precision = train["float32_matmul_precision"]
    if precision not in _PRECISIONS:
        raise UserError(
            f"train.float32_matmul_precision={precision}: must be one of {', '.join(_PRECISIONS)}"
        )
    if device.type == "cuda":  # some CPUs have TF32 as well; their results stay what they were
        torch.backends.cudnn.benchmark = train["cudnn_benchmark"]
        torch.set_float32_matmul_precision(precision)


@contextmanager
def fast_kernels(train: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """:func:`use_fast_kernels`, until the end of the context."""
    with backends_kept():
        use_fast_kernels(train, device)
        yield


@contextmanager
def backends_kept() -> Iterator[None]:
    """Restore the caller's settings of cuDNN and of matrix products at the end of the context."""
    benchmark, precision, newer = torch.backends.cudnn.benchmark, None, {}
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program uses PyTorch's newer settings, which this one cannot tell
        places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        newer = {place: place.fp32_precision for place in places}
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for place, value in newer.items():
            place.fp32_precision = value


@contextmanager
def without_cudnn_benchmark() -> Iterator[None]:
    """Switch ``train.cudnn_benchmark`` off for images that all have different shapes.

    cuDNN would try all its algorithms for each shape.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether a device is a CPU for which oneDNN has no bfloat16 kernels, as without AVX-512."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
