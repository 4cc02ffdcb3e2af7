"""What the command-line tools for pre-training and fine-tuning share."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig

from region_pretrain.config import TRAINED, check_parts, load_config
from region_pretrain.engine.methods import load_method
from region_pretrain.engine.output_dir import holds_run
from region_pretrain.engine.processes import launch
from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)


def training_examples(config: str) -> str:
    """The examples in the ``--help`` of a training.

    Args:
        config: the config that they use.
    """
    prog = "%(prog)s"
    return f"""
Examples:

Run a config with some of its settings overridden:
    {prog} --config-file {config} train.output_dir=output/run1 train.max_iter=1000

Resume the run after an interruption:
    {prog} --config-file {config} --resume train.output_dir=output/run1 train.max_iter=1000

On 8 GPUs, or with 2 processes on a CPU:
    {prog} --config-file {config} --num-gpus 8
    {prog} --config-file {config} --num-gpus 2 train.device=cpu
"""


def argument_parser(
    description: str, examples: str = "", prog: str | None = None
) -> argparse.ArgumentParser:
    """Detectron2's argument parser, with help texts for LazyConfigs.

    Args:
        description: what the tool does.
        examples: the end of ``--help``.
        prog: name of the command in ``--help``; default: that of the running script.
    """
    parser = default_argument_parser(epilog=examples)
    parser.prog = prog or parser.prog
    parser.description = description
    parser.fromfile_prefix_chars = "@"  # @FILE: further arguments, one per line
    parser.set_defaults(dist_url="auto")
    changed_help = {
        "resume": "continue the run in train.output_dir from its newest checkpoint",
        "num_gpus": "GPUs per machine; with train.device=cpu, the number of processes",
        "dist_url": "rendezvous address tcp://HOST:PORT; default auto, for a single machine",
        "eval_only": "only evaluate train.init_checkpoint",
        "config_file": "a LazyConfig (.py), the config.yaml of a run, a yacs config (.yaml), or a "
        "name in Detectron2's model zoo",
        "opts": "key=value overrides a key of the config, +key=value adds one, @FILE reads more; "
        "KEY.IN.UPPER_CASE=value overrides a yacs config before it is converted",
    }
    for action in parser._actions:
        action.help = changed_help.get(action.dest, action.help)
        if action.dest == "opts":
            action.nargs = "*"  # flags may follow overrides: parse with parse_intermixed_args
    return parser


def config_of(args: argparse.Namespace) -> DictConfig:
    """The config of a parsed command line.

    Args:
        args: parsed by :func:`argument_parser`, perhaps with
            :func:`~region_pretrain.engine.methods.add_method_arguments`.

    Raises:
        UserError: see :func:`~region_pretrain.config.load_config` and
            :func:`~region_pretrain.engine.methods.load_method`; or both ways are mixed, or the
            file lacks a part.
    """
    method, detector = getattr(args, "method", None), getattr(args, "detector", None)
    if method is None and detector is None:
        cfg = load_config(args.config_file, args.opts)
        only_evaluates = getattr(args, "eval_only", True)  # as the probe does
        check_parts(cfg, args.config_file, ("model", "dataloader") if only_evaluates else TRAINED)
        given = any(word.lstrip("+").startswith("train.output_dir=") for word in args.opts)
        if getattr(args, "resume", False) and not given:
            _check_same_folder(args.config_file, cfg.train.output_dir)
        return cfg
    if not method or not detector or args.config_file:
        raise UserError(
            "--method NAME and --detector FILE belong together and replace --config-file"
        )
    return load_method(method, detector, args.opts)


def _check_same_folder(config_file: str, output_dir: str) -> None:
    """Refuse to start anew in another working directory than that of the run in ``config.yaml``."""
    folder, name = os.path.split(os.path.abspath(config_file))
    here = os.path.abspath(output_dir)
    if name == "config.yaml" and here != folder and holds_run(folder) and not holds_run(here):
        raise UserError(
            f"--resume: {config_file} is that of the run in {folder}, but train.output_dir="
            f"{output_dir} is {here}, where there is no run: change to the directory in which it "
            f"was started, or add train.output_dir={folder}"
        )


def launch_with_config(args: argparse.Namespace, main: Callable[..., Any], *more: Any) -> None:
    """Load the config and run ``main(cfg, *more)`` in every process.

    Args:
        args: parsed by :func:`argument_parser`.
        main: importable by name.
        more: further arguments of ``main``.
    """
    cfg = config_of(args)
    on_cpu = cfg.train.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and cfg.train.device != "cpu" and args.num_gpus > 1:
        logger.warning("this machine has no GPU: %d processes on its CPU", args.num_gpus)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device="cpu" if on_cpu else "cuda",
        args=(cfg, *more),
    )
