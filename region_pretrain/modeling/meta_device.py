"""Builds networks without memory, to read their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _LinspaceOnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """``torch.device("meta")`` for networks with stochastic depth too.

    Detectron2's ViT, Swin and MViT read the drop rates of their blocks from a ``torch.linspace``,
    which has no values on the meta device.
    """
    with torch.device("meta"), _LinspaceOnCpu():
        yield
