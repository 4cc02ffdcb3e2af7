"""Measure a pre-training config on this machine: the loader compared with JPEG decoding alone, and
the training step compared with forward and backward of the networks alone.

    %(prog)s --config-file projects/SoCo/configs/soco_r18-fpn_b32_shapes.py \\
        --synthetic-images 64 dataloader.train.total_batch_size=8
    %(prog)s --config-file projects/SoCo/configs/soco_r18-fpn_b32_shapes.py \\
        --synthetic-images 64 --only step train.amp.enabled=true

Compute operators, FLOPs and memory of a step, without a GPU:

    %(prog)s --plan projects/SoCo/configs/soco_r50-fpn_16xb128-100ep_imagenet.py \\
        --gpus 8

Measure how well one recipe of each method uses a GPU:

    %(prog)s --gpu-report output/gpu_report

With --config-file, everything runs in this process: the loader on one core, the step on --threads
cores or on the GPU. Compare numbers of one run: its measurements alternate, so that other load
affects all equally.
"""

import argparse
import contextlib
import gc
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from region_pretrain.benchmark import measure
from region_pretrain.benchmark.gpu_report import GpuUse, describe_use, measure_use
from region_pretrain.benchmark.images import SIZE, make_jpegs
from region_pretrain.benchmark.plan import describe_plan, gpus_of, plan_step
from region_pretrain.commands import at_least_one, text_parser
from region_pretrain.config import check_parts, check_pretraining, load_config, load_file
from region_pretrain.engine.environment import machine
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.files import make_writable, write_text_atomic
from region_pretrain.json_files import write_json
from region_pretrain.system import cores

#: Defines ``report``, whose ``configs`` has one recipe per method.
REPORT = "configs/gpu_report.py"
REPORT_IMAGES = 256  # files; each config repeats them


#: What is measured -> the options that have an effect only there.
_OPTIONS = {
    "config_file": {"synthetic_images", "synthetic_size", "only", "seconds"},
    "plan": {"gpus"},
    "gpu_report": {"report_configs", "seconds"},
}


def width_and_height(text: str) -> tuple[int, int]:
    """Parse ``500x375`` as ``(500, 375)``."""
    try:
        width, height = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT, e.g. 2000x1500") from None
    return width, height


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="FILE", help="the pre-training config to measure")
    what.add_argument("--plan", metavar="FILE", help="the pre-training config to plan")
    what.add_argument(
        "--gpu-report", metavar="FOLDER", help="write FOLDER/report.md and FOLDER/report.json"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --plan: GPUs that share the batch (default: those of the config's name, or 1)",
    )
    parser.add_argument(
        "--report-configs",
        nargs="+",
        metavar="FILE",
        help=f"with --gpu-report: the configs to measure (default: those of {REPORT})",
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
    parser.add_argument(
        "--threads", type=at_least_one, default=1, help="CPU threads of a step (default 1)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to a file")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def parse_args(argv: list[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line, and refuse options that do not go together."""
    parser = make_parser(prog)
    args = parser.parse_intermixed_args(argv)
    if args.synthetic_size and args.synthetic_images is None:
        parser.error("--synthetic-size requires --synthetic-images N")
    given = next(mode for mode in _OPTIONS if getattr(args, mode) is not None)
    for option in sorted(set().union(*_OPTIONS.values()) - _OPTIONS[given]):
        if getattr(args, option) != parser.get_default(option):
            flags = [f"--{name.replace('_', '-')}" for name in (option, given)]
            parser.error(f"{flags[0]} has no effect with {flags[1]}")
    return args


def _load(path: str, overrides: list[str]) -> DictConfig:
    cfg = load_config(path, overrides)
    check_parts(cfg, path)
    check_pretraining(cfg)
    return cfg


def measure_config(args: argparse.Namespace) -> dict[str, Any]:
    """Measure loader and step of ``--config-file``, and print the results."""
    cfg = _load(args.config_file, args.opts)
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if args.synthetic_images is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            size = args.synthetic_size or SIZE
            measure.use_images(cfg, *make_jpegs(folder, args.synthetic_images, size))
        if args.only != "step":
            rates = measure.loader_rates(cfg, args.seconds)
            results["loader"] = asdict(rates)
            print(measure.describe_loader(rates))
        if args.only != "loader":
            rates = measure.step_rates(cfg, args.seconds)
            results["step"] = asdict(rates)
            print(measure.describe_step(rates))
    return results


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Plan a step of ``--plan``, and print the plan."""
    gpus = gpus_of(args.plan) if args.gpus is None else args.gpus
    plan = plan_step(_load(args.plan, args.opts), gpus)
    print(describe_plan(Path(args.plan).stem, plan))
    return asdict(plan)


def report_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report of ``--gpu-report`` after each config, so that nothing measured is lost."""
    if not torch.cuda.is_available():
        raise UserError("--gpu-report: PyTorch finds no GPU on this machine (try nvidia-smi)")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    described = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {len(cores())} CPU "
        f"cores; PyTorch {torch.__version__}"
    )
    configs = args.report_configs or load_file(REPORT).report.configs
    os.makedirs(args.gpu_report, exist_ok=True)
    uses: list[GpuUse] = []
    with tempfile.TemporaryDirectory() as folder:
        images = make_jpegs(folder, REPORT_IMAGES)
        for path in configs:
            cfg = _load(path, args.opts)
            total = properties.total_memory
            stem = Path(path).stem
            started = time.perf_counter()
            print(f"{stem} ({len(uses) + 1} of {len(configs)})", flush=True)
            uses.append(measure_use(cfg, stem, gpus_of(path), images, device, total, args.seconds))
            print(f"    {time.perf_counter() - started:.0f} s", flush=True)
            gc.collect()  # a trainer and its model refer to each other
            torch.cuda.empty_cache()
            results = {"machine": described, "configs": [asdict(use) for use in uses]}
            text = describe_use(uses, described)
            write_text_atomic(f"{args.gpu_report}/report.md", text)
            write_json(f"{args.gpu_report}/report.json", results)
    print(text)
    return results


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Measure or plan, and print the results."""
    args = parse_args(argv, prog)
    if args.json:
        make_writable(os.path.dirname(args.json), "the folder of --json")
    torch.set_num_threads(args.threads)
    run = measure_config if args.config_file else make_plan if args.plan else report_gpu
    results = {
        "config": args.config_file or args.plan,
        "overrides": args.opts,
        "machine": machine()["cpu"],
        "torch": torch.__version__,
        **run(args),
    }
    if args.json:
        write_json(args.json, results)
