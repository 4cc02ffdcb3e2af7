"""The exceptions that end a run, and the exit codes that command-line tools return for them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message names the file, key or value at fault and how to fix it."""

    def __str__(self) -> str:
        message = super().__str__()
        if "\nOriginal Traceback" in message:  # raised in a worker of a PyTorch DataLoader
            message = message.strip().rpartition("\n")[2].partition(": ")[2]
        return message


def describe(error: BaseException) -> str:
    """An exception in one line: its type and message, or only the message of a UserError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


#: Exit code of a run that stopped on request after saving its state (``EX_TEMPFAIL``).
STOPPED = 75


class Stopped(SystemExit):
    """A run stopped on request after saving its state; the process exits with :data:`STOPPED`."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class NonFiniteLoss(UserError, FloatingPointError):
    """A loss became NaN or infinite. The message names the last good checkpoint."""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate the ``main`` of a tool: a :class:`UserError` prints one line and exits with 2.

    So does a class of a config that cannot be imported.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except ImportError as error:
            if not str(error).startswith("Error loading"):  # of a _target_
                raise
            print(f"error: a _target_ of the config: {describe(error)}", file=sys.stderr)
            sys.exit(2)

    return wrapper
