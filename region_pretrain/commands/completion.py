"""Print the script with which a shell completes commands, options and file names.

    %(prog)s bash > ~/.local/share/bash-completion/completions/region-pretrain
    %(prog)s zsh > ~/.zfunc/_region-pretrain

For zsh, the folder must be in $fpath before ~/.zshrc calls compinit. The script does not start
Python, so it is as fast as the shell.
"""

from __future__ import annotations

import argparse
import importlib

import shtab

from region_pretrain.commands import text_parser
from region_pretrain.commands.cli import COMMANDS, PROG

#: Values of these kinds in a command's help are completed as paths.
_PATHS = {"FILE": shtab.FILE, "CSV": shtab.FILE, "DIR": shtab.DIRECTORY, "FOLDER": shtab.DIRECTORY}


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument("shell", choices=("bash", "zsh"))
    return parser


def complete_parser() -> argparse.ArgumentParser:
    """The parsers of all commands as one, which is read and never parses."""
    parser = argparse.ArgumentParser(PROG)
    commands = parser.add_subparsers()
    for name, (module, what) in COMMANDS.items():
        source = importlib.import_module(f"region_pretrain.commands.{module}")
        own = source.make_parser(f"{PROG} {name}")
        for action in own._actions:
            if action.metavar in _PATHS:
                action.complete = _PATHS[action.metavar]
            action.help = action.help and " ".join((action.help % vars_of(action, own)).split())
        commands.add_parser(name, help=what, parents=[own], add_help=False)
    return parser


def vars_of(action: argparse.Action, parser: argparse.ArgumentParser) -> dict[str, object]:
    """What ``%(...)s`` in an option's help stands for."""
    return {**vars(action), "prog": parser.prog}


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Print the script."""
    args = make_parser(prog).parse_args(argv)
    print(shtab.complete(complete_parser(), args.shell))
