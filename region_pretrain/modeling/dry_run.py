"""Building and running a user's modules to learn their shapes, on the meta device if possible."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from region_pretrain.errors import UserError, describe
from region_pretrain.modeling.given import training_modes_kept
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.random_state import random_state_kept

T = TypeVar("T")

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: Hooks that are part of a module, such as those of ``torch.nn.utils.weight_norm``.
_OWN_HOOKS = ("torch.", "region_pretrain.")


def dry_run(compute: Callable[[], T], name: str) -> T:
    """What a function that builds or runs modules returns on the meta device, or else on the CPU.

    The meta device needs no memory and no time, but has no values. Code that depends on them, such
    as ``assert torch.isfinite(x).all()``, runs again on the CPU. Random states do not change.

    Args:
        compute: creates its tensors on the default device; may be called twice.
        name: what it builds or runs, for the error message.

    Raises:
        UserError: it needs values, and fails on the CPU, too.
    """
    nested = torch.empty(0).device.type == "meta"
    try:
        with on_meta_device():
            return compute()
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        # Inside another dry run there are no values either: that one starts again on the CPU.
        if nested or "meta" not in str(error).lower():
            raise
    try:
        with random_state_kept(), torch.device("cpu"):
            return compute()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"{name} fails in a trial on the CPU, before the training: {describe(error)}: correct "
            "its code or its arguments"
        ) from error


def example(*shape: int) -> Tensor:
    """Normally distributed values on the default device, always the same."""
    if torch.empty(0).device.type == "meta":
        return torch.empty(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def copied_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters and buffers on the default device."""
    device = torch.empty(0).device
    named = (*module.named_parameters(), *module.named_buffers())
    if device.type == "meta":
        copies = {name: torch.empty_like(tensor, device=device) for name, tensor in named}
    else:
        copies = {name: tensor.detach().to(device, copy=True) for name, tensor in named}
    return {name: copies[name].requires_grad_(tensor.requires_grad) for name, tensor in named}


def output_of(module: nn.Module, *inputs: Tensor, tensors: dict[str, Tensor] | None = None) -> Any:
    """What a module computes in eval mode, from copies of its weights.

    Its buffers and modes do not change, and the user's hooks are not called.

    Args:
        module: may be on any device.
        inputs: on the default device.
        tensors: of :func:`copied_tensors`, if they are needed for gradients; else there are none.
    """
    with ExitStack() as stack:
        stack.enter_context(training_modes_kept(module))
        stack.enter_context(_hooks_off(module))
        if tensors is None:
            stack.enter_context(torch.no_grad())
            tensors = copied_tensors(module)
        return torch.func.functional_call(module.eval(), tensors, inputs)


@contextmanager
def _hooks_off(module: nn.Module) -> Iterator[None]:
    """Hide the user's hooks, which may need values."""
    hidden = [(part, key, part.__dict__[key]) for part in module.modules() for key in _HOOKS]
    for part, key, hooks in hidden:
        own = (
            (i, h)
            for i, h in hooks.items()
            if str(getattr(h, "__module__", "")).startswith(_OWN_HOOKS)
        )
        part.__dict__[key] = OrderedDict(own)
    try:
        yield
    finally:
        for part, key, hooks in hidden:
            part.__dict__[key] = hooks
