"""Library warnings that the user of a command-line tool can do nothing about."""

import logging
import warnings


def ignore_library_warnings() -> None:
    """Hide the warnings that Detectron2 0.6 causes with current versions of its dependencies.

    A command-line tool calls it before it imports anything else. Filters of the user (``-W``,
    ``PYTHONWARNINGS``) take precedence.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, append=True)  # torch.jit.script
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", append=True)
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming", append=True)
    # One line per process that it terminates, which would bury the error of the one that failed.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
