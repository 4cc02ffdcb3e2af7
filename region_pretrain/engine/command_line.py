"""What the command-line tools for pre-training and fine-tuning share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import default_argument_parser

from region_pretrain.config import load_config
from region_pretrain.engine.processes import launch


def argument_parser(description: str, example_config: str) -> argparse.ArgumentParser:
    """Detectron2's argument parser, with help texts for LazyConfigs.

    Args:
        description: what the tool does.
        example_config: config that the examples in ``--help`` use.
    """
    prog = "%(prog)s"
    parser = default_argument_parser(epilog=f"""
Examples:

Run a config with some of its settings overridden:
    {prog} --config-file {example_config} train.output_dir=output/run1 train.max_iter=1000

Resume the run after an interruption:
    {prog} --config-file {example_config} --resume train.output_dir=output/run1 train.max_iter=1000

On 8 GPUs, or with 2 processes on a CPU:
    {prog} --config-file {example_config} --num-gpus 8
    {prog} --config-file {example_config} --num-gpus 2 train.device=cpu
""")
    parser.description = description
    parser.fromfile_prefix_chars = "@"  # @FILE: further arguments, one per line
    parser.set_defaults(dist_url="auto")
    changed_help = {
        "resume": "continue the run in train.output_dir from its newest checkpoint",
        "num_gpus": "GPUs per machine; with train.device=cpu, the number of processes",
        "dist_url": "rendezvous address tcp://HOST:PORT; default auto, for a single machine",
        "eval_only": "only evaluate train.init_checkpoint",
        "opts": "key=value overrides a key of the config, +key=value adds one, @FILE reads more",
    }
    for action in parser._actions:
        action.help = changed_help.get(action.dest, action.help)
        if action.dest == "opts":
            action.nargs = "*"  # flags may follow overrides: parse with parse_intermixed_args
    return parser


def launch_with_config(args: argparse.Namespace, main: Callable[..., Any], *more: Any) -> None:
    """Load the config and run ``main(cfg, *more)`` in every process.

    Args:
        args: parsed by :func:`argument_parser`.
        main: importable by name.
        more: further arguments of ``main``.
    """
    cfg = load_config(args.config_file, args.opts)
    on_cpu = cfg.train.device == "cpu" or not torch.cuda.is_available()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device="cpu" if on_cpu else "cuda",
        args=(cfg, *more),
    )
