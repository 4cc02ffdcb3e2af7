#!/usr/bin/env python
"""Measure a pre-training config on this machine: its loader against the JPEG decoder alone, and
its training step against forward and backward of the networks alone.

    tools/benchmark.py --config-file projects/SoCo/configs/NAME.py --made-images 64 \\
        dataloader.train.total_batch_size=8
    tools/benchmark.py --config-file ... --only step train.amp.enabled=False

Everything runs in this process: the loader on one core, the step on --threads cores or on the GPU.
Kinds alternate round by round, so compare figures of one run, not of two.
"""

import argparse
import contextlib
import json
import platform
import tempfile
from dataclasses import asdict

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

import torch  # noqa: E402

from region_pretrain.benchmark import measure  # noqa: E402
from region_pretrain.benchmark.images import SIZE  # noqa: E402
from region_pretrain.config import load_config  # noqa: E402
from region_pretrain.errors import exit_on_user_error  # noqa: E402
from region_pretrain.files import write_text_atomic  # noqa: E402


def width_and_height(text: str) -> tuple[int, int]:
    """``(500, 375)`` of ``500x375``."""
    try:
        width, height = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT, such as 2000x1500") from None
    return width, height


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a pre-training")
    parser.add_argument(
        "--made-images",
        type=int,
        metavar="N",
        help="measure with N JPEGs made now and random regions, instead of the config's data set",
    )
    parser.add_argument(
        "--made-size",
        type=width_and_height,
        metavar="WxH",
        help="their size in pixels (default 500x375, of 80 kB each; others in proportion)",
    )
    parser.add_argument("--only", choices=("loader", "step"), help="default: both")
    parser.add_argument("--seconds", type=float, default=20, help="a kind (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a step on a CPU (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="for keys of the config")
    args = parser.parse_intermixed_args()
    if args.made_size and args.made_images is None:
        parser.error("--made-size is the size of made images: say how many with --made-images N")
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
        if args.made_images is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            measure.use_made_images(cfg, folder, args.made_images, args.made_size or SIZE)
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
