"""State of a run that Detectron2's own ``state_dict`` methods leave out."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

logger = logging.getLogger(__name__)


def loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Name of a RetinaNet or FCOS in a model -> its running mean of positive anchors.

    It divides the losses, is of this process, and is no buffer.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, DenseDetector)}
    return {n: float(m.loss_normalizer) for n, m in found.items() if hasattr(m, "loss_normalizer")}


def set_loss_normalizers(
    model: nn.Module, saved: Sequence[Mapping[str, float]], rank: int, world_size: int
) -> None:
    """Restore :func:`loss_normalizers`.

    Args:
        model: the model.
        saved: those of all processes; empty: a checkpoint without them.
        rank, world_size: of this run. Processes of another number get the mean.
    """
    if not saved:
        return
    for name in saved[0]:
        values = [state[name] for state in saved]
        same = len(saved) == world_size
        value = values[rank] if same else statistics.fmean(values)
        model.get_submodule(name).loss_normalizer = value


def hook_states(hooks: Sequence[HookBase]) -> dict[str, Any]:
    """Class of each hook with a state -> the state; further ones of a class are ``Class#2``, ..."""
    states = {name: hook.state_dict() for name, hook in _named(hooks)}
    return {name: state for name, state in states.items() if state}


def load_hook_states(hooks: Sequence[HookBase], states: Mapping[str, Any]) -> None:
    """Restore :func:`hook_states`; a hook that is no longer there is a warning."""
    named = dict(_named(hooks))
    for name, state in states.items():
        if name in named:
            named[name].load_state_dict(state)
        else:
            logger.warning("there is no hook %s any more: its state is ignored", name)


def _named(hooks: Sequence[HookBase]) -> Iterator[tuple[str, HookBase]]:
    seen = Counter()
    for hook in hooks:
        name = type(hook).__qualname__
        seen[name] += 1
        yield (f"{name}#{seen[name]}" if seen[name] > 1 else name), hook
