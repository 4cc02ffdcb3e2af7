#!/usr/bin/env python
"""Compare OpenMP settings for a training on the CPU, alone and beside a process that keeps one core
busy.

    tools/benchmark_threads.py tools/train_net.py \\
        --config-file configs/detection/mask_rcnn_r18_fpn_shapes.py

The trainings take turns, so that other load on the machine affects all settings equally. On a
machine with many cores, choose some of them with taskset -c 0,1.
"""

import argparse
import sys
import tempfile

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

from region_pretrain.benchmark.threads import SETTINGS, compare_settings, describe_settings
from region_pretrain.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="time per measurement (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements per setting (default %(default)s)"
    )
    parser.add_argument("tool", help="tools/pretrain_net.py or tools/train_net.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the tool")
    args = parser.parse_args()
    command = [sys.executable, args.tool, *args.arguments]
    with tempfile.TemporaryDirectory() as folder:
        rates = compare_settings(command, folder, SETTINGS, args.seconds, args.rounds)
    print(describe_settings(rates))


if __name__ == "__main__":
    main()
