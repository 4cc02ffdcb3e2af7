"""The exceptions that end a run, parts of their messages, and the exit codes of tools."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Bad input. The message names the file, key or value at fault and how to fix it.

    Attributes:
        exit_code: of a tool that it ends.
    """

    exit_code = 2

    def __str__(self) -> str:
        message = super().__str__()
        if "\nOriginal Traceback" in message:  # raised in a worker of a PyTorch DataLoader
            message = message.strip().rpartition("\n")[2].partition(": ")[2]
        return message


#: In the message of a worker of a loader that died. That of a worker's exception is "Caught
#: KeyError in DataLoader worker process 0".
DEAD_WORKER = re.compile(r"DataLoader worker (\(pid|sent no batch)")


def describe(error: BaseException) -> str:
    """An exception in one line: its type and message, or only the message of a UserError."""
    text = " ".join(str(error).split())
    if isinstance(cause := error.__cause__, SyntaxError):  # Detectron2 names the file only
        text = f"{text} Line {cause.lineno}: {cause.msg}"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def did_you_mean(
    name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6, otherwise: str = ""
) -> str:
    """The end of a message about an unknown name, ``"; did you mean a, b?"``.

    Args:
        name: the unknown name.
        known: the names that exist.
        count: number of similar names, at most.
        cutoff: least similarity, from 0 to 1.
        otherwise: the result if no name is similar.
    """
    near = difflib.get_close_matches(name, list(known), count, cutoff)
    return f"; did you mean {', '.join(near)}?" if near else otherwise


def first_few(items: Sequence[str], count: int, separator: str = ", ") -> str:
    """The first items in one line, such as ``"a, b and 7 more"``."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return separator.join(items[:count]) + more


#: Exit code of a run that stopped on request after saving its state (``EX_TEMPFAIL``).
STOPPED = 75
#: Exit code of a process that Ctrl-C ended before it could save anything.
INTERRUPTED = 130
#: Exit code of a tool whose output nothing reads any more, as of one that died from SIGPIPE.
UNREAD = 141
#: Exit code of a tool that lost a process which was killed: 128 + SIGKILL.
KILLED = 137


class ProcessKilled(UserError):
    """A process that the tool needs was killed, e.g. because memory ran out.

    Another attempt may succeed: a job is requeued, as if the tool itself had been killed.
    """

    exit_code = KILLED


class Stopped(SystemExit):
    """A run stopped on request after saving its state; the process exits with :data:`STOPPED`."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class NonFiniteLoss(UserError, FloatingPointError):
    """A loss became NaN or infinite. The message names the last good checkpoint.

    Attributes:
        everywhere: whether all processes raise it together.
    """

    everywhere = True


def _output_is_closed() -> bool:
    """Whether standard output is a pipe that nothing reads; if so, it goes nowhere from now on."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate the ``main`` of a tool: a :class:`UserError` prints one line and exits with 2.

    So does a class of a config that cannot be imported. A :class:`ProcessKilled` exits with 137.
    Ctrl-C prints one line and exits with 130. If nothing reads standard output any more, as after
    ``| head``, the tool exits with 141.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            result = main(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except BrokenPipeError:
            if not _output_is_closed():
                raise
            message, code = "", UNREAD
        except UserError as error:
            message, code = f"error: {error}", error.exit_code
        except ImportError as error:
            if not str(error).startswith("Error loading"):  # of a _target_
                raise
            message, code = f"error: a _target_ of the config: {describe(error)}", 2
        except KeyboardInterrupt:
            message, code = "interrupted", INTERRUPTED
        except Stopped as error:
            message, code = "", error.code
        # Here the frames of the error are freed. A loader in one of them ends its workers; left to
        # the interpreter's exit, they would be waited for forever.
        if message:
            print(message, file=sys.stderr)
        sys.exit(code)

    return wrapper
