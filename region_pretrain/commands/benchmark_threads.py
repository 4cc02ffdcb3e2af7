"""Compare OpenMP settings for a training on the CPU, alone and beside a process that keeps one core
busy.

    %(prog)s tools/train_net.py \\
        --config-file configs/detection/mask_rcnn_r18_fpn_shapes.py

The trainings take turns, so that other load on the machine affects all settings equally. On a
machine with many cores, choose some of them with taskset -c 0,1.
"""

import argparse
import os
import sys
import tempfile

from region_pretrain.benchmark.threads import SETTINGS, compare_settings, describe_settings
from region_pretrain.commands import at_least_one, text_parser
from region_pretrain.errors import exit_on_user_error
from region_pretrain.shipped import find_shipped


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument(
        "--seconds", type=float, default=10, help="time per measurement (default %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=3,
        help="measurements per setting (default %(default)s)",
    )
    parser.add_argument("tool", help="tools/pretrain_net.py or tools/train_net.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the tool")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Measure, and print the table."""
    args = make_parser(prog).parse_args(argv)
    tool = args.tool if os.path.exists(args.tool) else str(find_shipped(args.tool) or args.tool)
    command = [sys.executable, tool, *args.arguments]
    with tempfile.TemporaryDirectory() as folder:
        rates = compare_settings(command, folder, SETTINGS, args.seconds, args.rounds)
    print(describe_settings(rates))
