"""Damages the bytes of files, and judges what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from region_pretrain.errors import UserError

#: The same examples in every run.
FUZZ = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def fuzz(examples: int) -> settings:
    """Decorator of a fuzz test with this many examples."""
    return settings(max_examples=examples, **FUZZ)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a file: flipped bits, a torn write, a lost block, inserted or other bytes."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "zero", "insert", "replace"]))
    # Where: both ends have headers and directories.
    place = draw(st.floats(0, 1) | st.integers(-200, 200))
    bit, length = draw(st.integers(0, 7)), draw(st.integers(1, 64))
    other = draw(st.binary(max_size=40) | st.sampled_from([b"[" * 100_000, b"null", b"[]", b"7"]))

    def change(data: bytes) -> bytes:
        size = len(data)
        at = int(place * (size - 1)) if isinstance(place, float) else place % max(size, 1)
        if kind == "replace":
            return other
        if kind == "insert":
            return data[:at] + other + data[at:]
        if kind == "cut":
            return data[:at]
        if kind == "zero":
            return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
        changed = bytearray(data)
        if changed:
            changed[at] ^= 1 << bit
        return bytes(changed)

    change.__name__ = f"{kind}-at-{place}"
    return change


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or its UserError, whose message must be one line.

    Any other exception fails the test.
    """
    try:
        return action()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), str(error)
        return error


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
