"""The command lines: :mod:`region_pretrain.commands.cli` has one sub-command per other module.

Each module has a ``make_parser(prog)`` and a ``main(argv, prog)``, where ``prog`` is the name of
the command in its help. The files in ``tools/`` call ``main()``.
"""

import argparse
import os
import sys

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()  # before a command imports anything else

if sys.platform == "darwin":  # PyTorch reads it when it is imported
    # Operations that Apple GPUs lack run on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def program(prog: str | None) -> str:
    """A command's name in its help; without ``prog`` that of the file in ``tools/``."""
    return prog or f"tools/{os.path.basename(sys.argv[0])}"


def text_parser(prog: str | None, description: str) -> argparse.ArgumentParser:
    """A parser that prints its description as it is, with ``%(prog)s`` replaced.

    ``@FILE`` reads further arguments, one per line.
    """
    return argparse.ArgumentParser(
        program(prog),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )


def at_least_one(text: str) -> int:
    """The type of an option that counts something."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
