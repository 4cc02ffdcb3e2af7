"""LARS with SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from region_pretrain.errors import UserError


class LARS(Optimizer):
    r"""Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888, as in BYOL).

    For each parameter ``w`` with gradient ``g`` of a group::

        g <- g + weight_decay * w
        g <- g * trust_coefficient * ||w|| / (||g|| + eps)   if adapt and ||w|| > 0 and ||g|| > 0
        v <- momentum * v + g
        w <- w - lr * v

    The norm in the denominator is that of the *decayed* gradient. Algorithm 1 of the LARS paper,
    ``form="original"``, as in ``timm.optim.Lars``, divides by ``||g|| + weight_decay * ||w||`` and
    has the learning rate inside the momentum::

        v <- momentum * v + lr * trust_coefficient * ||w|| / (||g|| + weight_decay * ||w||)
                               * (g + weight_decay * w)
        w <- w - v

    A step does not synchronise with the device.

    Args:
        params: parameters or groups; a group may override ``weight_decay`` and ``adapt``, see
            :func:`region_pretrain.solver.param_groups.pretrain_param_groups`.
        lr: learning rate.
        momentum: SGD momentum, without Nesterov.
        weight_decay: L2 penalty.
        trust_coefficient: the factor of the ratio of norms.
        eps: added to the norm in the denominator.
        adapt: whether to apply the ratio of norms.
        form: ``"decayed"`` (as in BYOL) or ``"original"``, see above.

    Raises:
        UserError: a value is negative, or the form is unknown.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        adapt: bool = True,
        form: str = "decayed",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        for name, value in defaults.items():
            if value < 0:
                raise UserError(f"optimizer.{name}={value}: must not be negative")
        if form not in ("decayed", "original"):
            raise UserError(f"optimizer.form={form}: must be decayed or original")
        super().__init__(params, {**defaults, "adapt": adapt, "form": form})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: evaluates the model and returns the loss.

        Returns:
            The result of ``closure``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        original = group["form"] == "original"
        decay = group["weight_decay"]
        grads = raw = [p.grad for p in params]
        if decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        if group["adapt"]:
            w_norm = torch.stack(torch._foreach_norm(params))  # (number of parameters,)
            g_norm = torch.stack(torch._foreach_norm(raw if original else grads))
            scale = g_norm + decay * w_norm if original else g_norm
            ratio = group["trust_coefficient"] * w_norm / (scale + group["eps"])
            ratio = torch.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
            grads = torch._foreach_mul(grads, list(ratio.unbind()))
        if original:
            grads = torch._foreach_mul(grads, group["lr"])
        if group["momentum"]:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            grads = buffers
        torch._foreach_add_(params, grads, alpha=-1.0 if original else -group["lr"])
