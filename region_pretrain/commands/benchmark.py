"""Measure a pre-training config on this machine: the loader compared with JPEG decoding alone, and
the training step compared with forward and backward of the networks alone.

    tools/benchmark.py --config-file projects/SoCo/configs/NAME.py --synthetic-images 64 \\
        dataloader.train.total_batch_size=8
    tools/benchmark.py --config-file ... --only step train.amp.enabled=False

Compute operators, FLOPs and memory of a step, without a GPU:

    tools/benchmark.py --plan projects/SoCo/configs/NAME.py --gpus 8

Measure how well one recipe of each method uses a GPU:

    tools/benchmark.py --gpu-report output/gpu_report

With --config-file, everything runs in this process: the loader on one core, the step on --threads
cores or on the GPU. Compare numbers of one run: its measurements alternate, so that other load
affects all equally.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from region_pretrain.benchmark import measure
from region_pretrain.benchmark.gpu_report import GpuUse, describe_use, measure_use
from region_pretrain.benchmark.images import SIZE, make_jpegs
from region_pretrain.benchmark.plan import describe_plan, gpus_of, plan_step
from region_pretrain.config import load_config
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.files import write_text_atomic

PROJECTS = Path(__file__).parents[2] / "projects"
#: One recipe per method.
REPORT_CONFIGS = [
    str(PROJECTS / path)
    for path in (
        "MoCo/configs/moco-v2_r50_8xb32-200ep_imagenet.py",
        "BYOL/configs/byol_r50_32xb128-100ep_imagenet.py",
        "SoCo/configs/soco_r50-fpn_16xb128-100ep_imagenet.py",
        "CCOP/configs/ccop_r50-fpn_8xb32-200ep_coco.py",
        "MCL/configs/mcl_r50-fpn_32xb128-100ep_imagenet.py",
        "PointRegionContrast/configs/point-region_r50-fpn_8xb32-200ep_imagenet.py",
    )
]
REPORT_IMAGES = 256  # files; each config repeats them


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
        default=REPORT_CONFIGS,
        metavar="FILE",
        help="with --gpu-report: the configs to measure (default: one per method)",
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


def measure_config(args: argparse.Namespace) -> dict[str, Any]:
    """Measure loader and step of ``--config-file``, and print the results."""
    cfg = load_config(args.config_file, args.opts)
    results: dict[str, Any] = {}
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
    return results


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Plan a step of ``--plan``, and print the plan."""
    gpus = gpus_of(args.plan) if args.gpus is None else args.gpus
    plan = plan_step(load_config(args.plan, args.opts), gpus)
    print(describe_plan(Path(args.plan).stem, plan))
    return asdict(plan)


def report_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report of ``--gpu-report`` after each config, so that nothing measured is lost."""
    if not torch.cuda.is_available():
        raise UserError("--gpu-report: PyTorch finds no GPU on this machine (try nvidia-smi)")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    machine = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {os.cpu_count()} CPU "
        f"cores; PyTorch {torch.__version__}"
    )
    os.makedirs(args.gpu_report, exist_ok=True)
    uses: list[GpuUse] = []
    with tempfile.TemporaryDirectory() as folder:
        images = make_jpegs(folder, REPORT_IMAGES)
        for path in args.report_configs:
            cfg = load_config(path, args.opts)
            total = properties.total_memory
            stem = Path(path).stem
            started = time.perf_counter()
            print(f"{stem} ({len(uses) + 1} of {len(args.report_configs)})", flush=True)
            uses.append(measure_use(cfg, stem, gpus_of(path), images, device, total, args.seconds))
            print(f"    {time.perf_counter() - started:.0f} s", flush=True)
            gc.collect()  # a trainer and its model refer to each other
            torch.cuda.empty_cache()
            results = {"machine": machine, "configs": [asdict(use) for use in uses]}
            text = describe_use(uses, machine)
            write_text_atomic(f"{args.gpu_report}/report.md", text)
            write_text_atomic(f"{args.gpu_report}/report.json", json.dumps(results, indent=2))
    print(text)
    return results


@exit_on_user_error
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    run = measure_config if args.config_file else make_plan if args.plan else report_gpu
    results = {
        "config": args.config_file or args.plan,
        "overrides": args.opts,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        **run(args),
    }
    if args.json:
        write_text_atomic(args.json, json.dumps(results, indent=2) + "\n")
