"""Timing and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

_MIN_ROUNDS = 3


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Time several functions in turn, so that other load on the machine affects all equally.

    Args:
        functions: functions by name; each is called once per round. The first round is a warm-up.
        seconds: duration of the measurement, which has at least three rounds.
        after_round: called after each round.

    Returns:
        Median seconds per call by name.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_ROUNDS or time.perf_counter() < end:
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
        rounds += 1
        after_round()
    return {name: float(np.median(values)) for name, values in times.items()}


def reset_peak_memory(device: torch.device) -> None:
    """Reset :func:`region_pretrain.engine.memory.peak_memory_mib`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # not permitted everywhere; the peak is then that of the process's lifetime
        pass
