"""Fine-tune a detector, from pre-trained or random weights, and evaluate it."""

from __future__ import annotations

import argparse

from region_pretrain.commands import program
from region_pretrain.engine.command_line import (
    argument_parser,
    launch_with_config,
    training_examples,
)
from region_pretrain.engine.finetune import do_evaluate, do_train
from region_pretrain.errors import exit_on_user_error
from region_pretrain.jobs.submission import add_slurm_arguments, submit_training, wants_slurm


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    examples = training_examples("configs/detection/mask_rcnn_r18_fpn_shapes.py")
    parser = argument_parser(__doc__, examples, program(prog))
    add_slurm_arguments(parser)
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run or submit a fine-tuning, or with ``--eval-only`` an evaluation."""
    args = make_parser(prog).parse_intermixed_args(argv)
    if wants_slurm(args):
        submit_training(args, "tools/train_net.py")
    elif args.eval_only:
        launch_with_config(args, do_evaluate)
    else:
        launch_with_config(args, do_train, args.resume)
