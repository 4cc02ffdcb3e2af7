"""A base class that catches misspelt hooks when a subclass is defined."""

from __future__ import annotations

import difflib
import inspect


class Contract:
    """Base class of the interfaces that methods implement.

    Every public method of a direct subclass of ``Contract`` is a hook that the library calls.
    Further subclasses may override hooks and add other methods. A method whose name is almost that
    of a hook, or a hook that cannot be called with the hook's arguments, is an error: without this
    check it would never be called, or fail hours into a run.

    Raises:
        TypeError: when a subclass is defined, naming the method and the hook.
    """

    _hooks: dict[str, inspect.Signature] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        own = {
            name: value
            for name, value in vars(cls).items()
            if inspect.isfunction(value) and (not name.startswith("_") or name == "__call__")
        }
        if Contract in cls.__bases__:
            cls._hooks = {name: inspect.signature(method) for name, method in own.items()}
            return
        for name, method in own.items():
            if name in cls._hooks:
                _check_arguments(cls, name, method, cls._hooks[name])
            elif near := difflib.get_close_matches(name, cls._hooks, n=1, cutoff=0.85):
                raise TypeError(
                    f"{cls.__qualname__}.{name} would never be called: rename it to {near[0]} if "
                    f"that is meant, otherwise to something less similar to {near[0]}"
                )


def _check_arguments(cls: type, name: str, method: object, hook: inspect.Signature) -> None:
    arguments = [None] * len(hook.parameters)  # ``self`` included
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{cls.__qualname__}.{name}{inspect.signature(method)} must accept the arguments of "
            f"{name}{hook}: {error}"
        ) from None
