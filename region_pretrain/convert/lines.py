"""Lines that several targets of an export have: about pixels, strides, and what stays empty."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from region_pretrain.convert.facts import Facts
from region_pretrain.convert.layout import ResNetLayout


def values(values: Sequence[float], scale: float = 1.0) -> str:
    return "[" + ", ".join(f"{value * scale:.8g}" for value in values) + "]"


def unknown_pixels(facts: Facts) -> list[str]:
    if None in (facts.input_format, facts.pixel_mean, facts.pixel_std):
        return ["# pixel format, mean and std are unknown: use those of its training"]
    return []


def pixel_lines(facts: Facts) -> list[str]:
    """Python lines with mean and std of images in [0, 1]."""
    lines = unknown_pixels(facts)
    if not lines:
        lines = [
            f"mean = {values(facts.pixel_mean, 1 / 255)}"
            f"  # {facts.input_format}, for pixels in [0, 1]",
            f"std = {values(facts.pixel_std, 1 / 255)}",
        ]
    if facts.input_format == "BGR":
        lines.append("# the model must be fed BGR images: image[[2, 1, 0]]")
    return lines


def stride_lines(facts: Facts, net: ResNetLayout) -> list[str]:
    if net.bottleneck and facts.stride_in_1x1 is None:
        return ["# the stride of the bottlenecks is unknown: assumed in the 3x3 convolution"]
    return []


def not_filled(expected: Iterable[str], state: Sequence[str]) -> list[str]:
    """A comment on the expected modules of which a state dict has nothing."""
    absent = [p for p in expected if not any(name.startswith(f"{p}.") for name in state)]
    return [f"# not filled: {', '.join(absent)}"] if absent else []
