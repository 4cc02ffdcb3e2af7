"""The one exception that means "the input is wrong", and how a command line ends on it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message names the file, key or value at fault and how to mend it."""


#: Exit code of a run that was told to stop and has saved where it is (``EX_TEMPFAIL``).
STOPPED = 75


class Stopped(SystemExit):
    """A run was told to stop and has saved where it is; ends the process with :data:`STOPPED`."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class NonFiniteLoss(UserError, FloatingPointError):
    """A loss became NaN or infinite. The message names the last good checkpoint."""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate a command line's ``main``: a :class:`UserError` ends it with one line and code 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapper
