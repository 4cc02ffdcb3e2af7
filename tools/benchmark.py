#!/usr/bin/env python
"""Measure a pre-training config on this machine: the loader compared with JPEG decoding alone, and
the training step compared with forward and backward of the networks alone.

    tools/benchmark.py --config-file projects/SoCo/configs/NAME.py --synthetic-images 64 \\
        dataloader.train.total_batch_size=8
    tools/benchmark.py --config-file ... --only step train.amp.enabled=False

Everything runs in this process: the loader on one core, the step on --threads cores or on the GPU.
Compare numbers of one run: its measurements alternate, so that other load affects all equally.
"""

import argparse
import contextlib
import json
import platform
import tempfile
from dataclasses import asdict

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

import torch

from region_pretrain.benchmark import measure
from region_pretrain.benchmark.images import SIZE
from region_pretrain.config import load_config
from region_pretrain.errors import exit_on_user_error
from region_pretrain.files import write_text_atomic


def width_and_height(text: str) -> tuple[int, int]:
    """Parse ``500x375`` as ``(500, 375)``."""
    try:
        width, height = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT, e.g. 2000x1500") from None
    return width, height


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a pre-training config"
    )
    parser.add_argument(
        "--synthetic-images",
        type=int,
        metavar="N",
        help="use N synthetic JPEGs with random regions instead of the config's data set",
    )
    parser.add_argument(
        "--synthetic-size",
        type=width_and_height,
        metavar="WxH",
        help="their size in pixels (default 500x375, or 80 kB per file)",
    )
    parser.add_argument(
        "--only", choices=("loader", "step"), help="measure one of them (default: both)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20, help="time per measurement (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a step (default 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results to a file")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    args = parser.parse_intermixed_args()
    if args.synthetic_size and args.synthetic_images is None:
        parser.error("--synthetic-size requires --synthetic-images N")
    return args


@exit_on_user_error
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    cfg = load_config(args.config_file, args.opts)
    results = {
        "config": args.config_file,
        "overrides": args.opts,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    with contextlib.ExitStack() as stack:
        if args.synthetic_images is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            size = args.synthetic_size or SIZE
            measure.use_synthetic_images(cfg, folder, args.synthetic_images, size)
        if args.only != "step":
            rates = measure.loader_rates(cfg, args.seconds)
            results["loader"] = asdict(rates)
            print(measure.describe_loader(rates))
        if args.only != "loader":
            rates = measure.step_rates(cfg, args.seconds)
            results["step"] = asdict(rates)
            print(measure.describe_step(rates))
    if args.json:
        write_text_atomic(args.json, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
