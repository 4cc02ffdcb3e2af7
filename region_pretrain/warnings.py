"""Library warnings and tracebacks that tell the user of a command-line tool nothing."""

import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


def ignore_library_warnings() -> None:
    """Hide the warnings that Detectron2 0.6 causes with current versions of its dependencies.

    A command-line tool calls it before it imports anything else. From then on, Ctrl-C prints one
    line instead of a traceback, also while the tool is still importing. Filters of the user
    (``-W``, ``PYTHONWARNINGS``) take precedence.
    """
    _add_filters()
    # One line per process that it terminates, which would bury the error of the one that failed;
    # and a note of PyTorch on its own use of one of its functions.
    for name in ("torch.multiprocessing.spawn", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.excepthook = _print_exception


@contextmanager
def library_warnings_ignored() -> Iterator[None]:
    """Hide these warnings in the context only."""
    with warnings.catch_warnings():
        _add_filters()
        yield


def _add_filters() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, append=True)  # torch.jit.script
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", append=True)
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming", append=True)


def _print_exception(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    elif multiprocessing.current_process().name == "MainProcess":  # one line for all processes
        print("interrupted", file=sys.stderr)
