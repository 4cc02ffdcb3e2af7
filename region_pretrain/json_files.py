"""JSON files that the library writes and reads again, in which everything is checked.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from region_pretrain.errors import UserError, describe
from region_pretrain.files import write_text_atomic

T = TypeVar("T")


def read_json(path: str, kind: type[T], fix: str) -> T:
    """Read a JSON file.

    Args:
        path: a local file.
        kind: what it contains; see :func:`build`.
        fix: how to fix a damaged file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or it contains something else.
    """
    try:
        with open(path, "rb") as file:
            return build(kind, json.load(file))
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # what should be its folder is a file
        raise FileNotFoundError(*error.args) from None
    except OSError as error:  # the file itself may be sound
        raise UserError(f"{path} cannot be read: {describe(error)}") from error
    except (ValueError, TypeError, RecursionError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or of another version ({reason}): {fix}") from None


def write_json(path: str, value: Any) -> None:
    """Replace a JSON file as :func:`~region_pretrain.files.write_atomic` does."""
    write_text_atomic(path, json.dumps(value, indent=1) + "\n")


def build(kind: Any, value: Any, where: str = "its content") -> Any:
    """Plain values, as JSON has them, in the form of a type.

    Args:
        kind: a dataclass or ``TypedDict``, or a type made of lists, tuples of any length, dicts
            with text as keys, unions, ``str``, ``int``, ``float``, ``bool``, None and ``Any``.
        value: the values.
        where: their place, for the error message.

    Returns:
        Instances of the dataclasses, tuples where the type has them, otherwise ``value``.

    Raises:
        TypeError: the values do not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return build(option, value, where)
            except TypeError:
                pass
        raise TypeError(f"{where} must be {kind}")
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or not value.keys() <= hints.keys():
            raise TypeError(f"{where} must be {kind.__name__}")
        fields = {k: build(hints[k], v, f"{where}, {k}"[-80:]) for k, v in value.items()}
        if typing.is_typeddict(kind) and not kind.__required_keys__ <= fields.keys():
            raise TypeError(f"{where} lacks {', '.join(kind.__required_keys__ - fields.keys())}")
        return kind(**fields)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} must be a list")
        items = (build(arguments[0], item, where) for item in value)
        return tuple(items) if origin is tuple else list(items)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise TypeError(f"{where} must be a dict")
        return {key: build(arguments[1], item, f"{where}, {key}") for key, item in value.items()}
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) and kind is not bool:
        raise TypeError(f"{where} must be {getattr(kind, '__name__', kind)}")
    return value
