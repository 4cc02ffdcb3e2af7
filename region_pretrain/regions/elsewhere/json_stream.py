"""JSON files of any length, read one value at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER_TAIL = 2  # "1.5e-" decodes as 1.5, and leaves two characters


class NotJson(ValueError):
    """A text is not JSON, or not of the expected kind."""


class JsonStream:
    """Walks through a JSON text without keeping it in memory.

    Every method may raise :class:`NotJson`.

    Args:
        file: the text.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at, self._passed = "", 0, 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the text."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Decode the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise NotJson(f"{error.msg} at character {self._passed + error.pos}") from error
            length, number = end - self._at, isinstance(value, int | float)
            if number and end + _NUMBER_TAIL >= len(self._text) and self._more():
                continue  # the number may be longer
            self._at += length
            return value

    def items(self) -> Iterator[Any]:
        """Decode the elements of the next value, an array."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self._take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the next value, an object; the caller reads the value after each."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                self._take('"')
            key = self.value()
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def end(self) -> None:
        """Expect the end of the text."""
        if self.peek():
            raise NotJson(f"text after its end at character {self._passed + self._at}")

    def _take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            what = repr(found) if found else "the end"
            raise NotJson(
                f"expected {' or '.join(expected)}, found {what} at character "
                f"{self._passed + self._at}"
            )
        self._at += 1
        return found

    def _more(self) -> bool:
        """Read on. The chunk grows with what is left, so that a long value takes linear time."""
        left = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK, len(left)))
        self._passed += self._at
        self._text, self._at = left + chunk, 0
        return bool(chunk)
